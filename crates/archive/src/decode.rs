//! Reading headers: bytes in, events out, no I/O.

use crate::{BLOCK, Entry, Error, Kind, Time};

/// Largest pax header or GNU long name, in bytes.
pub const MAX_META: u64 = 1 << 20;
/// Longest name or link target, in bytes: the kernel's `PATH_MAX` with its NUL.
const MAX_PATH: usize = 4095;
/// Zero bytes that may follow the end blocks; writers pad to a record, 10 KiB as a rule.
const MAX_PADDING: u64 = 1 << 20;
/// First size that eleven octal digits cannot hold.
const BEYOND_OCTAL: u64 = 1 << 33;

/// How large an archive may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Members.
    pub max_entries: u64,
    /// Bytes of content, all files together.
    pub max_bytes: u64,
    /// Components of a name.
    pub max_depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_entries: 1_000_000, max_bytes: 1 << 40, max_depth: 256 }
    }
}

/// What the next bytes of an archive meant.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A member begins.
    Entry(Entry),
    /// Some of its content, never empty.
    Data(&'a [u8]),
    /// The member is complete.
    Done,
}

enum State {
    /// A header block is due; `true` after one zero block.
    Header(bool),
    /// Records of an extended header: type flag, bytes still to come.
    Meta(u8, usize),
    /// Content: bytes still to come, padding after it.
    Data(u64, usize),
    /// Padding of content or records: bytes still to come.
    Padding(usize),
    /// After the end blocks: zero bytes seen.
    Trailer(u64),
}

/// What extended headers said about the member that follows.
#[derive(Default)]
struct Pending {
    has_pax: bool,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<Time>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    long_path: bool,
    long_link: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        !self.has_pax && !self.long_path && !self.long_link
    }
}

/// Turns the bytes of an archive into events.
///
/// It is strict: a header whose checksum is wrong, a size that two headers tell differently, a
/// record that is given twice, a sparse map, a number that is negative or cut, or anything but
/// zeros after the end is an error, because two parsers could take it for two archives.
pub struct Decoder {
    state: State,
    block: [u8; BLOCK],
    filled: usize,
    meta: Vec<u8>,
    pending: Pending,
    limits: Limits,
    entries: u64,
    bytes: u64,
}

impl Decoder {
    /// A decoder that stands at the first byte of an archive.
    pub fn new(limits: Limits) -> Self {
        Self {
            state: State::Header(false),
            block: [0; BLOCK],
            filled: 0,
            meta: Vec::new(),
            pending: Pending::default(),
            limits,
            entries: 0,
            bytes: 0,
        }
    }

    /// Members so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Bytes of content so far, as the headers announced them.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes bytes off the front of `input` up to the next event; `None` when `input` is used up.
    ///
    /// # Errors
    ///
    /// [`Error::Malformed`], [`Error::Limit`] or [`Error::Refused`]; the decoder is of no use then.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Error> {
        loop {
            match self.state {
                State::Header(after_zero) => {
                    let part = take(input, BLOCK - self.filled);
                    if let Some(room) = self.block.get_mut(self.filled..self.filled + part.len()) {
                        room.copy_from_slice(part);
                    }
                    self.filled += part.len();
                    if self.filled < BLOCK {
                        return Ok(None);
                    }
                    self.filled = 0;
                    if let Some(entry) = self.header(after_zero)? {
                        return Ok(Some(Event::Entry(entry)));
                    }
                }
                State::Meta(flag, left) => {
                    let part = take(input, left);
                    self.meta.extend_from_slice(part);
                    let left = left - part.len();
                    self.state = State::Meta(flag, left);
                    if left > 0 {
                        return Ok(None);
                    }
                    let meta = std::mem::take(&mut self.meta);
                    self.state = State::Padding(padding(meta.len() as u64));
                    self.extended(flag, &meta)?;
                }
                State::Data(0, padding) => {
                    self.state = State::Padding(padding);
                    return Ok(Some(Event::Done));
                }
                State::Data(left, padding) => {
                    let part = take(input, usize::try_from(left).unwrap_or(usize::MAX));
                    if part.is_empty() {
                        return Ok(None);
                    }
                    self.state = State::Data(left - part.len() as u64, padding);
                    return Ok(Some(Event::Data(part)));
                }
                State::Padding(left) => {
                    let left = left - take(input, left).len();
                    if left > 0 {
                        self.state = State::Padding(left);
                        return Ok(None);
                    }
                    self.state = State::Header(false);
                }
                State::Trailer(seen) => {
                    let part = take(input, usize::MAX);
                    if part.iter().any(|byte| *byte != 0) {
                        return Err(Error::malformed("data after the end", b""));
                    }
                    let seen = seen + part.len() as u64;
                    self.state = State::Trailer(seen);
                    if seen > MAX_PADDING {
                        return Err(Error::Limit { what: "zero bytes after its end", limit: MAX_PADDING });
                    }
                    return Ok(None);
                }
            }
        }
    }

    /// Call it when the input has ended: an archive without its two end blocks was cut.
    ///
    /// # Errors
    ///
    /// [`Error::Truncated`].
    pub fn finish(&self) -> Result<(), Error> {
        if matches!(self.state, State::Trailer(_)) { Ok(()) } else { Err(Error::Truncated) }
    }

    /// All members are complete, but the end blocks are missing or were cut.
    ///
    /// Some image builders forget to close their archive. Whether it is whole can only be known
    /// from elsewhere then, such as its digest.
    pub fn is_unterminated(&self) -> bool {
        let between = match self.state {
            State::Header(_) => self.filled == 0,
            State::Padding(_) => true,
            _ => false,
        };
        between && self.entries > 0 && self.pending.is_empty()
    }

    fn header(&mut self, after_zero: bool) -> Result<Option<Entry>, Error> {
        if self.block.iter().all(|byte| *byte == 0) {
            if !self.pending.is_empty() {
                return Err(Error::malformed("extended header without a member", b""));
            }
            self.state = if after_zero { State::Trailer(0) } else { State::Header(true) };
            return Ok(None);
        }
        if after_zero {
            return Err(Error::malformed("header after an end block", b""));
        }
        let raw = Raw::parse(&self.block)?;
        match raw.flag {
            b'x' | b'g' | b'L' | b'K' => {
                self.begin_extended(&raw)?;
                Ok(None)
            }
            _ => self.member(raw).map(Some),
        }
    }

    fn begin_extended(&mut self, raw: &Raw) -> Result<(), Error> {
        let twice = match raw.flag {
            b'x' => std::mem::replace(&mut self.pending.has_pax, true),
            b'L' => std::mem::replace(&mut self.pending.long_path, true),
            b'K' => std::mem::replace(&mut self.pending.long_link, true),
            // A global header speaks of all members that follow, so none may be half announced.
            _ => !self.pending.is_empty(),
        };
        if twice {
            return Err(Error::malformed("two extended headers for one member", &raw.path));
        }
        if raw.flag == b'g' {
            self.count_entry()?;
        }
        if raw.size > MAX_META {
            return Err(Error::Limit { what: "bytes in an extended header", limit: MAX_META });
        }
        self.state = State::Meta(raw.flag, raw.size as usize);
        Ok(())
    }

    fn extended(&mut self, flag: u8, meta: &[u8]) -> Result<(), Error> {
        match flag {
            b'L' | b'K' => {
                let slot = if flag == b'L' { &mut self.pending.path } else { &mut self.pending.link };
                if slot.replace(long_name(meta)?).is_some() {
                    return Err(Error::malformed("both pax and GNU tell a name", meta));
                }
            }
            b'g' => {
                // Readers differ in whether they heed these, so only what changes nothing passes.
                for (key, _) in pax_records(meta)? {
                    if key != b"comment" {
                        return Err(Error::malformed("global header that changes members", key));
                    }
                }
            }
            _ => self.pax(meta)?,
        }
        Ok(())
    }

    fn pax(&mut self, meta: &[u8]) -> Result<(), Error> {
        let pending = &mut self.pending;
        let records = pax_records(meta)?;
        for (key, value) in &records {
            match *key {
                b"path" | b"linkpath" => {
                    if value.is_empty() || value.contains(&0) {
                        return Err(Error::malformed("empty name or NUL in a pax record", key));
                    }
                    let (slot, long) = if *key == b"path" {
                        (&mut pending.path, pending.long_path)
                    } else {
                        (&mut pending.link, pending.long_link)
                    };
                    if long {
                        return Err(Error::malformed("both pax and GNU tell a name", value));
                    }
                    *slot = Some(value.to_vec());
                }
                b"size" => pending.size = Some(number(value, key)?),
                b"uid" => pending.uid = Some(id(number(value, key)?)?),
                b"gid" => pending.gid = Some(id(number(value, key)?)?),
                b"mtime" => pending.mtime = Some(time(value)?),
                b"hdrcharset" if *value != b"BINARY" && *value != b"ISO-IR 10646 2000 UTF-8" => {
                    return Err(Error::malformed("unknown hdrcharset", value));
                }
                b"SCHILY.realsize" => return Err(Error::refused("sparse file", value)),
                _ if key.starts_with(b"GNU.sparse.") => return Err(Error::refused("sparse file", key)),
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        if name.is_empty() || name.len() > 255 || name.contains(&0) {
                            return Err(Error::malformed("name of an extended attribute", key));
                        }
                        pending.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }

    fn count_entry(&mut self) -> Result<(), Error> {
        self.entries += 1;
        if self.entries > self.limits.max_entries {
            return Err(Error::Limit { what: "members", limit: self.limits.max_entries });
        }
        Ok(())
    }

    fn member(&mut self, raw: Raw) -> Result<Entry, Error> {
        self.count_entry()?;
        let pending = std::mem::take(&mut self.pending);
        let path = pending.path.unwrap_or(raw.path);
        let slash = path.ends_with(b"/");
        let kind = match raw.flag {
            // Before ustar a directory was a file whose name ends in a slash.
            0 if slash => Kind::Directory,
            0 | b'0' | b'7' => Kind::File,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(Error::refused("sparse file", &path)),
            _ => return Err(Error::malformed("unknown type of member", &path)),
        };
        if slash && kind != Kind::Directory {
            return Err(Error::malformed("slash at the end of what is no directory", &path));
        }
        let size = match pending.size {
            Some(size) if size == raw.size => size,
            // Only a size that ustar cannot hold has a reason to differ; writers then put zero,
            // or the largest number that fits, into the old field.
            Some(size) if size >= BEYOND_OCTAL && (raw.size == 0 || raw.size == BEYOND_OCTAL - 1) => size,
            Some(_) => return Err(Error::malformed("two sizes for one member", &path)),
            None => raw.size,
        };
        if kind != Kind::File && size != 0 {
            return Err(Error::malformed("content in what is no file", &path));
        }
        let is_link = matches!(kind, Kind::Symlink | Kind::Hardlink);
        if !is_link && pending.link.is_some() {
            return Err(Error::malformed("link target of what is no link", &path));
        }
        let link = if is_link { pending.link.unwrap_or(raw.link) } else { Vec::new() };
        if path.is_empty() || (is_link && link.is_empty()) {
            return Err(Error::malformed("empty name", &path));
        }
        if path.len() > MAX_PATH || link.len() > MAX_PATH {
            return Err(Error::Limit { what: "bytes in a name", limit: MAX_PATH as u64 });
        }
        if path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).count() > self.limits.max_depth {
            return Err(Error::Limit { what: "directories above a member", limit: self.limits.max_depth as u64 });
        }
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.limits.max_bytes {
            return Err(Error::Limit { what: "bytes of content", limit: self.limits.max_bytes });
        }
        self.state = State::Data(size, padding(size));
        Ok(Entry {
            path,
            kind,
            link,
            mode: raw.mode,
            uid: pending.uid.map_or_else(|| id(raw.uid), Ok)?,
            gid: pending.gid.map_or_else(|| id(raw.gid), Ok)?,
            size,
            mtime: pending.mtime.unwrap_or(Time { secs: raw.mtime, nanos: 0 }),
            xattrs: pending.xattrs,
        })
    }
}

/// The fields of one header block.
struct Raw {
    path: Vec<u8>,
    link: Vec<u8>,
    mode: u32,
    uid: u64,
    gid: u64,
    size: u64,
    mtime: i64,
    flag: u8,
}

impl Raw {
    fn parse(block: &[u8; BLOCK]) -> Result<Self, Error> {
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        let own: u64 = block[148..156].iter().map(|byte| u64::from(*byte)).sum();
        if field(&block[148..156], false).ok().flatten() != Some(sum - own + 8 * u64::from(b' ')) {
            return Err(Error::malformed("wrong checksum", b""));
        }
        let mut path = text(&block[..100]).to_vec();
        let flag = block[156];
        match &block[257..265] {
            b"ustar\x0000" => {
                // Some readers take the end of this field for times of `star`, others for the name.
                if &block[508..] == b"tar\0" {
                    return Err(Error::malformed("star header", &path));
                }
                let prefix = text(&block[345..500]);
                if !prefix.is_empty() {
                    path = [prefix, b"/", path.as_slice()].concat();
                }
            }
            b"ustar  \0" => {
                // Times and sparse maps to some readers, a part of the name to others.
                if flag != b'S' && block[345..500].iter().any(|byte| *byte != 0) {
                    return Err(Error::malformed("old GNU fields in use", &path));
                }
            }
            [0, 0, 0, 0, 0, 0, 0, 0] if matches!(flag, 0 | b'0' | b'1' | b'2' | b'5') => {}
            _ => return Err(Error::malformed("unknown kind of tar", &path)),
        }
        let mtime = &block[136..148];
        Ok(Self {
            link: text(&block[157..257]).to_vec(),
            mode: (field(&block[100..108], false)?.unwrap_or(0) & 0o7777) as u32,
            uid: field(&block[108..116], true)?.unwrap_or(0),
            gid: field(&block[116..124], true)?.unwrap_or(0),
            size: field(&block[124..136], true)?.unwrap_or(0),
            mtime: match negative(mtime) {
                Some(secs) => secs,
                None => field(mtime, true)?.unwrap_or(0) as i64,
            },
            path,
            flag,
        })
    }
}

/// Up to `most` bytes off the front of `input`.
fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (part, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    part
}

fn padding(size: u64) -> usize {
    (size.wrapping_neg() % BLOCK as u64) as usize
}

/// A field's text: up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A numeric field: octal digits, or base 256 where `binary` allows it; `None` when it is blank.
fn field(bytes: &[u8], binary: bool) -> Result<Option<u64>, Error> {
    const WRONG: &str = "malformed number in a header";
    let (first, rest) = bytes.split_first().ok_or(Error::Truncated)?;
    if binary && *first == 0x80 {
        let mut value = 0_u64;
        for byte in rest {
            // At most 63 bits, so that every signed reader sees the same number.
            value = (value < 1 << 55)
                .then(|| value << 8 | u64::from(*byte))
                .ok_or(Error::malformed("number too large in a header", b""))?;
        }
        return Ok(Some(value));
    }
    let mut digits = bytes.trim_ascii_start();
    let mut value = None;
    while let Some((digit @ b'0'..=b'7', rest)) = digits.split_first() {
        // Twelve digits are the widest field: 36 bits.
        value = Some(value.unwrap_or(0) << 3 | u64::from(digit - b'0'));
        digits = rest;
    }
    if digits.iter().all(|byte| matches!(byte, 0 | b' ')) { Ok(value) } else { Err(Error::malformed(WRONG, b"")) }
}

/// A time before 1970 in base 256, as GNU tar writes it.
fn negative(bytes: &[u8]) -> Option<i64> {
    let (head, tail) = bytes.split_last_chunk::<8>()?;
    let secs = i64::from_be_bytes(*tail);
    (head.iter().all(|byte| *byte == 0xff) && secs < 0).then_some(secs)
}

/// An id that an account can have; the largest number is "nobody changes" to the kernel.
fn id(value: u64) -> Result<u32, Error> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or(Error::malformed("owner that no account can have", b""))
}

fn long_name(meta: &[u8]) -> Result<Vec<u8>, Error> {
    let name = meta.strip_suffix(b"\0").unwrap_or(meta);
    if name.is_empty() || name.contains(&0) {
        return Err(Error::malformed("malformed GNU long name", b""));
    }
    Ok(name.to_vec())
}

/// A key and its value.
type Record<'a> = (&'a [u8], &'a [u8]);

/// Splits `"LENGTH KEY=VALUE\n"` records; no key may come twice.
fn pax_records(mut meta: &[u8]) -> Result<Vec<Record<'_>>, Error> {
    const WRONG: &str = "malformed pax record";
    let mut records: Vec<Record<'_>> = Vec::new();
    while !meta.is_empty() {
        let space = meta.iter().take(8).position(|byte| *byte == b' ').ok_or(Error::malformed(WRONG, b""))?;
        let (digits, _) = meta.split_at(space);
        let length = number(digits, b"length of a pax record")? as usize;
        if digits.starts_with(b"0") || length > meta.len() {
            return Err(Error::malformed(WRONG, b""));
        }
        let (record, rest) = meta.split_at(length);
        meta = rest;
        let body =
            record.get(space + 1..).and_then(|body| body.strip_suffix(b"\n")).ok_or(Error::malformed(WRONG, b""))?;
        let equals = body.iter().position(|byte| *byte == b'=').ok_or(Error::malformed(WRONG, b""))?;
        let (key, value) = body.split_at(equals);
        if key.is_empty() || key.contains(&0) {
            return Err(Error::malformed(WRONG, b""));
        }
        records.push((key, value.get(1..).unwrap_or_default()));
    }
    let mut keys: Vec<&[u8]> = records.iter().map(|(key, _)| *key).collect();
    keys.sort_unstable();
    if let Some(twice) = keys.windows(2).find_map(|pair| (pair.first() == pair.last()).then(|| pair.first()).flatten())
    {
        return Err(Error::malformed("pax record given twice", twice));
    }
    Ok(records)
}

/// A decimal number without sign or spaces, below 2^63.
fn number(digits: &[u8], what: &[u8]) -> Result<u64, Error> {
    let wrong = || Error::malformed("malformed number in a pax record", what);
    if digits.is_empty() || digits.len() > 19 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(wrong());
    }
    let value = digits.iter().fold(0_u64, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    if i64::try_from(value).is_ok() { Ok(value) } else { Err(wrong()) }
}

/// Decimal seconds since 1970, with a sign and a fraction where there are any.
fn time(value: &[u8]) -> Result<Time, Error> {
    let (minus, digits) = value.strip_prefix(b"-").map_or((false, value), |rest| (true, rest));
    let mut parts = digits.splitn(2, |byte| *byte == b'.');
    let secs = number(parts.next().unwrap_or_default(), b"mtime")? as i64;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(Error::malformed("malformed number in a pax record", b"mtime"));
    }
    let places = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = places.fold(0_u32, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Ok(match (minus, nanos) {
        (false, nanos) => Time { secs, nanos },
        (true, 0) => Time { secs: -secs, nanos: 0 },
        (true, nanos) => Time { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}
