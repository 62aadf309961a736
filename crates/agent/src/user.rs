//! Users and groups as the image's own /etc/passwd and /etc/group tell them.
//!
//! Both files belong to the sandbox and may say anything, be anything or change at any time: they are read bounded,
//! never waited for, and a line that is not exactly what passwd(5) or group(5) says is passed over.

use std::ffi::CStr;

use crate::sys::{self, Error, Result};

/// Largest passwd or group file that is looked at, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most supplementary groups a user gets.
const MAX_GROUPS: usize = 256;
/// Largest id an image may use; the next one is the guest agent's own.
pub const MAX_ID: u32 = 65_535;
/// The guest agent's own id.
const AGENT_ID: u32 = 65_536;

/// Whom a command runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
    /// Login name; empty when the image knows none.
    pub name: Vec<u8>,
    /// Home directory, absolute.
    pub home: Vec<u8>,
    /// Login shell.
    pub shell: Vec<u8>,
}

/// One line of passwd(5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Account<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
    shell: &'a [u8],
}

/// One line of group(5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

/// Reads a number made of nothing but digits.
fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 10 {
        return None;
    }
    let mut value = 0_u32;
    for byte in text {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        value = value.checked_mul(10)?.checked_add(u32::from(digit))?;
    }
    Some(value)
}

/// Splits a line into exactly `N` fields.
fn fields<const N: usize>(line: &[u8]) -> Option<[&[u8]; N]> {
    let mut out = [&[] as &[u8]; N];
    let mut parts = line.split(|byte| *byte == b':');
    for field in &mut out {
        *field = parts.next()?;
    }
    if parts.next().is_some() || line.contains(&0) { None } else { Some(out) }
}

fn accounts(passwd: &[u8]) -> impl Iterator<Item = Account<'_>> {
    passwd.split(|byte| *byte == b'\n').filter_map(|line| {
        let [name, _, uid, gid, _, home, shell] = fields(line)?;
        if name.is_empty() {
            return None;
        }
        Some(Account { name, uid: number(uid)?, gid: number(gid)?, home, shell })
    })
}

fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    group.split(|byte| *byte == b'\n').filter_map(|line| {
        let [name, _, gid, members] = fields(line)?;
        if name.is_empty() { None } else { Some(Group { name, gid: number(gid)?, members }) }
    })
}

/// Finds out whom `spec` means.
///
/// `spec` is `name`, `uid`, `name:group` or `uid:gid`; digits are always an id, never a name; empty is root.
///
/// # Errors
/// `EINVAL` for a malformed spec or an id that no image may use, `ENOENT` for a name that nobody has.
pub fn resolve(spec: &[u8], passwd: &[u8], group: &[u8]) -> Result<Identity> {
    let (user, wanted_group) = match spec.iter().position(|byte| *byte == b':') {
        Some(at) => {
            let (user, rest) = spec.split_at(at);
            (user, rest.get(1..))
        }
        None => (spec, None),
    };
    let user = if spec.is_empty() { b"0" as &[u8] } else { user };
    if user.is_empty() || wanted_group.is_some_and(<[u8]>::is_empty) {
        return Err(Error::new("user", libc::EINVAL));
    }
    let account = match number(user) {
        Some(uid) => accounts(passwd).find(|account| account.uid == uid),
        None => accounts(passwd).find(|account| account.name == user),
    };
    let (uid, mut gid) = match (account, number(user)) {
        (Some(account), _) => (account.uid, account.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) if user == b"root" => (0, 0),
        (None, None) => return Err(Error::new("user", libc::ENOENT)),
    };
    let mut extra = Vec::new();
    if let Some(wanted) = wanted_group {
        // As with Docker, a group that is named replaces all that the image would give.
        gid = match number(wanted) {
            Some(gid) => gid,
            None => groups(group)
                .find(|entry| entry.name == wanted)
                .map(|entry| entry.gid)
                .ok_or(Error::new("group", libc::ENOENT))?,
        };
    } else if let Some(account) = account {
        let member = |entry: &Group<'_>| entry.members.split(|byte| *byte == b',').any(|name| name == account.name);
        extra.extend(groups(group).filter(member).map(|entry| entry.gid).filter(|id| *id <= MAX_ID).take(MAX_GROUPS));
    }
    let absolute = |path: &[u8]| path.first() == Some(&b'/');
    let default_home: &[u8] = if uid == 0 { b"/root" } else { b"/" };
    let default_name: &[u8] = if uid == 0 { b"root" } else { b"" };
    Ok(Identity {
        uid,
        gid,
        groups: extra,
        name: account.map_or(default_name, |account| account.name).to_vec(),
        home: account.map(|account| account.home).filter(|home| absolute(home)).unwrap_or(default_home).to_vec(),
        shell: account.map(|account| account.shell).filter(|shell| absolute(shell)).unwrap_or(b"/bin/sh").to_vec(),
    })
}

/// What tells one state of a file from another.
type Stamp = Option<(u64, u64, i64, i64, i64)>;

/// Looks users up; remembers the last one as long as both files stay as they are.
#[derive(Debug)]
pub struct Users {
    own_uid: u32,
    privileged: bool,
    last: Option<(Vec<u8>, [Stamp; 2], Identity)>,
}

impl Users {
    /// `privileged`: this process may become somebody else.
    pub fn new(own_uid: u32, privileged: bool) -> Self {
        Self { own_uid, privileged, last: None }
    }

    /// Finds out whom `spec` means, in the files as they are now; see [`resolve`].
    ///
    /// Without privileges (as in tests) an empty spec is whoever runs the agent.
    pub fn find(&mut self, spec: &[u8]) -> Result<Identity> {
        let stamps = [stamp(c"/etc/passwd"), stamp(c"/etc/group")];
        if let Some((last_spec, last_stamps, identity)) = &self.last
            && last_spec == spec
            && *last_stamps == stamps
        {
            return Ok(identity.clone());
        }
        let own = self.own_uid.to_string();
        let wanted = if spec.is_empty() && !self.privileged { own.as_bytes() } else { spec };
        let identity = resolve(wanted, &read_whole(c"/etc/passwd"), &read_whole(c"/etc/group"))?;
        let allowed = |id: u32| id <= MAX_ID || (id == self.own_uid && id != AGENT_ID);
        if !allowed(identity.uid) || identity.gid > MAX_ID {
            return Err(Error::new("user", libc::EINVAL));
        }
        self.last = Some((spec.to_vec(), stamps, identity.clone()));
        Ok(identity)
    }
}

/// The state of a file; `None` when it is not there.
fn stamp(path: &CStr) -> Stamp {
    let file = sys::openat2(None, path, libc::O_PATH, 0, 0).ok()?;
    let stat = sys::fstat(&file).ok()?;
    Some((
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime * 1_000_000_000 + stat.st_mtime_nsec,
        stat.st_ctime_nsec,
    ))
}

/// A small regular file's bytes; anything else counts as empty.
fn read_whole(path: &CStr) -> Vec<u8> {
    let open = || -> Result<Vec<u8>> {
        let file = sys::openat2(None, path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY, 0, 0)?;
        let stat = sys::fstat(&file)?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG || stat.st_size as u64 > MAX_FILE {
            return Err(Error::new("open", libc::EINVAL));
        }
        let mut bytes = vec![0; stat.st_size as usize];
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..)
            && !rest.is_empty()
        {
            match sys::read(&file, rest)? {
                0 => break,
                count => done += count,
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    };
    open().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n\
        daemon:x:1:1::/usr/sbin:/usr/sbin/nologin\n\
        broken:x:7\n\
        toomany:x:8:8:a:/h:/s:extra\n\
        minus:x:-5:8:a:/h:/s\n\
        plus:x:+5:8:a:/h:/s\n\
        big:x:4294967296:8:a:/h:/s\n\
        ada:x:1000:1000:Ada,,,:/home/ada:/bin/zsh\n\
        relative:x:1001:1001::home:sh\n\
        12:x:1002:1002::/twelve:/bin/sh\n";
    const GROUP: &[u8] = b"root:x:0:\nwheel:x:10:root,ada\nvideo:x:44:ada\nnot:x:45:adam\nbroken:x:ada\n\
        huge:x:70000:ada\n";

    #[test]
    fn a_name_gets_its_ids_groups_home_and_shell() {
        let ada = resolve(b"ada", PASSWD, GROUP).unwrap();
        assert_eq!((ada.uid, ada.gid, ada.groups), (1000, 1000, vec![10, 44]));
        assert_eq!((ada.home.as_slice(), ada.shell.as_slice()), (b"/home/ada" as &[u8], b"/bin/zsh" as &[u8]));
    }

    #[test]
    fn an_empty_user_is_root_even_without_any_file() {
        let root = resolve(b"", b"", b"").unwrap();
        assert_eq!((root.uid, root.gid, root.name.as_slice()), (0, 0, b"root" as &[u8]));
        assert_eq!(root.home, b"/root");
        assert_eq!(resolve(b"root", b"", b"").unwrap().uid, 0);
    }

    #[test]
    fn digits_are_an_id_and_never_a_name() {
        let twelve = resolve(b"12", PASSWD, GROUP).unwrap();
        assert_eq!((twelve.uid, twelve.gid, twelve.home.as_slice()), (12, 0, b"/" as &[u8]));
    }

    #[test]
    fn a_group_after_the_colon_replaces_all_groups() {
        let ada = resolve(b"ada:video", PASSWD, GROUP).unwrap();
        assert_eq!((ada.gid, ada.groups), (44, vec![]));
        assert_eq!(resolve(b"1000:5", PASSWD, GROUP).unwrap().gid, 5);
    }

    #[test]
    fn malformed_specs_and_unknown_names_are_refused() {
        for (spec, errno) in [
            (b":" as &[u8], libc::EINVAL),
            (b"ada:", libc::EINVAL),
            (b":video", libc::EINVAL),
            (b"nobody-here", libc::ENOENT),
            (b"ada:none", libc::ENOENT),
            (b"-1", libc::ENOENT),
            (b"4294967296", libc::ENOENT),
        ] {
            assert_eq!(resolve(spec, PASSWD, GROUP).unwrap_err().errno, errno, "{spec:?}");
        }
    }

    #[test]
    fn malformed_lines_are_passed_over() {
        for name in [b"broken" as &[u8], b"toomany", b"minus", b"plus", b"big"] {
            assert!(resolve(name, PASSWD, GROUP).is_err(), "{name:?}");
        }
        let relative = resolve(b"relative", PASSWD, GROUP).unwrap();
        assert_eq!((relative.home.as_slice(), relative.shell.as_slice()), (b"/" as &[u8], b"/bin/sh" as &[u8]));
    }

    #[test]
    fn the_agents_own_id_is_nobodys() {
        let mut users = Users::new(AGENT_ID, true);
        assert_eq!(users.find(b"65536").unwrap_err().errno, libc::EINVAL);
        assert_eq!(users.find(b"0:65536").unwrap_err().errno, libc::EINVAL);
        assert_eq!(users.find(b"4294967295").unwrap_err().errno, libc::EINVAL);
    }

    #[test]
    fn no_bytes_make_the_parser_fall_over() {
        let mut seed = 1_u32;
        for _ in 0..2_000 {
            let bytes: Vec<u8> = (0..64)
                .map(|_| {
                    seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12_345);
                    *b":\n\0a0,9x".get((seed >> 16) as usize % 8).unwrap()
                })
                .collect();
            let _ = resolve(&bytes[..5], &bytes, &bytes);
        }
    }
}
