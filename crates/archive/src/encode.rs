//! Writing headers.

use crate::{BLOCK, Entry, Error, Kind, Time};

/// Largest size that eleven octal digits hold; larger ones go to a pax record.
const MAX_OCTAL_SIZE: u64 = 0o777_7777_7777;
/// Largest id that seven octal digits hold.
const MAX_OCTAL_ID: u32 = 0o777_7777;

/// A header, ready to be written before the member's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// One block, or a pax header with its records and then one block.
    pub header: Vec<u8>,
    /// Zero bytes that follow the content.
    pub padding: usize,
}

/// Encodes a header in ustar form, with a pax header before it where ustar cannot say it.
///
/// # Errors
///
/// [`Error::Refused`] when the name is empty or has a NUL: no tar can hold it.
pub fn encode(entry: &Entry) -> Result<Encoded, Error> {
    if entry.path.is_empty() || entry.path.contains(&0) || entry.link.contains(&0) {
        return Err(Error::refused("name is empty or has a NUL", &entry.path));
    }
    let mut records = Vec::new();
    let name = fit(&entry.path, 100);
    if name.is_none() {
        record(&mut records, b"path", &entry.path);
    }
    let link = fit(&entry.link, 100);
    if link.is_none() {
        record(&mut records, b"linkpath", &entry.link);
    }
    if entry.size > MAX_OCTAL_SIZE {
        record(&mut records, b"size", entry.size.to_string().as_bytes());
    }
    for (key, id) in [(b"uid", entry.uid), (b"gid", entry.gid)] {
        if id > MAX_OCTAL_ID {
            record(&mut records, key, id.to_string().as_bytes());
        }
    }
    let plain_time = u64::try_from(entry.mtime.secs).ok().filter(|secs| *secs <= MAX_OCTAL_SIZE);
    if plain_time.is_none() || entry.mtime.nanos != 0 {
        record(&mut records, b"mtime", decimal(entry.mtime).as_bytes());
    }
    for (key, value) in &entry.xattrs {
        record(&mut records, &[b"SCHILY.xattr.", key.as_slice()].concat(), value);
    }

    let mut header = Vec::with_capacity(BLOCK);
    if !records.is_empty() {
        let mut pax = Entry::new(b"./PaxHeaders/x", Kind::File);
        pax.mode = 0o644;
        pax.size = records.len() as u64;
        header.extend_from_slice(&block(&pax, b'x', &pax.path, b"", 0));
        header.extend_from_slice(&records);
        header.resize(header.len().next_multiple_of(BLOCK), 0);
    }
    let flag = match entry.kind {
        Kind::File => b'0',
        Kind::Hardlink => b'1',
        Kind::Symlink => b'2',
        Kind::CharDevice => b'3',
        Kind::BlockDevice => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
    };
    let name = name.unwrap_or_else(|| cut(&entry.path, 100));
    let link = link.unwrap_or_else(|| cut(&entry.link, 100));
    header.extend_from_slice(&block(entry, flag, name, link, plain_time.unwrap_or(0)));
    let padding = (entry.size.next_multiple_of(BLOCK as u64) - entry.size) as usize;
    Ok(Encoded { header, padding })
}

/// A comment that stands in the place of a member: `left out, WHY: PATH`.
///
/// Source: pax interchange format, global extended header; readers pass over comments.
pub(crate) fn left_out(path: &[u8], why: &str) -> Vec<u8> {
    let mut records = Vec::new();
    record(&mut records, b"comment", &[b"left out, ", why.as_bytes(), b": ", path].concat());
    let mut global = Entry::new(b"./GlobalHead/x", Kind::File);
    global.mode = 0o644;
    global.size = records.len() as u64;
    let mut header = block(&global, b'g', &global.path, b"", 0).to_vec();
    header.extend_from_slice(&records);
    header.resize(header.len().next_multiple_of(BLOCK), 0);
    header
}

/// The two zero blocks that end an archive.
pub fn trailer() -> [u8; 2 * BLOCK] {
    [0; 2 * BLOCK]
}

/// The text itself, when a field of `room` bytes can hold it for every reader.
///
/// Other than ASCII goes to pax, which says that it is UTF-8.
fn fit(text: &[u8], room: usize) -> Option<&[u8]> {
    (text.len() <= room && text.is_ascii()).then_some(text)
}

fn cut(text: &[u8], room: usize) -> &[u8] {
    text.get(..room).unwrap_or(text)
}

/// Appends `"LENGTH KEY=VALUE\n"`, where LENGTH counts itself.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let bare = key.len() + value.len() + 3;
    let mut length = bare + 1;
    while bare + length.to_string().len() != length {
        length = bare + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn decimal(time: Time) -> String {
    match (time.secs, time.nanos) {
        (secs, 0) => secs.to_string(),
        (secs, nanos) if secs >= 0 => format!("{secs}.{nanos:09}"),
        // -1.25 s is kept as -2 s and 750,000,000 ns.
        (secs, nanos) => format!("-{}.{:09}", -(secs + 1), 1_000_000_000 - nanos),
    }
}

/// A field of octal digits that ends in NUL; what does not fit is written as 0, pax has it then.
fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let text = format!("{value:0digits$o}");
    let text = if text.len() > digits { format!("{:0digits$o}", 0) } else { text };
    for (place, digit) in field.iter_mut().zip(text.bytes()) {
        *place = digit;
    }
}

fn block(entry: &Entry, flag: u8, name: &[u8], link: &[u8], mtime: u64) -> [u8; BLOCK] {
    let mut block = [0_u8; BLOCK];
    copy(&mut block[..100], name);
    octal(&mut block[100..108], u64::from(entry.mode & 0o7777));
    octal(&mut block[108..116], u64::from(entry.uid));
    octal(&mut block[116..124], u64::from(entry.gid));
    octal(&mut block[124..136], entry.size);
    octal(&mut block[136..148], mtime);
    block[156] = flag;
    copy(&mut block[157..257], link);
    copy(&mut block[257..265], b"ustar\x0000");
    octal(&mut block[329..337], 0);
    octal(&mut block[337..345], 0);
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum::<u64>() + 8 * u64::from(b' ');
    octal(&mut block[148..155], sum);
    block[155] = b' ';
    block
}

fn copy(field: &mut [u8], text: &[u8]) {
    for (place, byte) in field.iter_mut().zip(text) {
        *place = *byte;
    }
}
