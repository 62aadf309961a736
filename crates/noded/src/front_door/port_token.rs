//! Who may use a port of a sandbox: whoever knows its access token, or a token that was made for this one port. A
//! browser is let in by the latter only: code that the port serves may get at what a browser is handed for it.
//!
//! A port's token is `EXPIRES.CODE`: the second since 1970 at which it ends, in decimal, and the HMAC-SHA256, in lower
//! case hexadecimal, of `port:SANDBOX:PORT:EXPIRES` with the access token as key. Whoever has the access token makes
//! one without asking anybody, and can hand it to a browser: it opens nothing else.

use super::registry::Attached;
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of the code.
const CODE_LEN: usize = 32;

/// Why a token does not open a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is neither the access token nor made with it for this port.
    Wrong,
    /// It was good once.
    Expired,
}

/// Lets the holder of either token through to a port, or not.
pub fn check(attached: &Attached, sandbox: &str, port: u16, token: &[u8]) -> Result<(), Refused> {
    if attached.token.matches(token) { Ok(()) } else { check_made(attached, sandbox, port, token) }
}

/// Lets the holder of a token that was made for a port through to it, or not.
pub fn check_made(attached: &Attached, sandbox: &str, port: u16, token: &[u8]) -> Result<(), Refused> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    check_at(attached, sandbox, port, token, now)
}

fn check_at(attached: &Attached, sandbox: &str, port: u16, token: &[u8], now: u64) -> Result<(), Refused> {
    let (expires, code) = parse(token).ok_or(Refused::Wrong)?;
    if !attached.token.vouches(&format!("port:{sandbox}:{port}:{expires}"), &code) {
        return Err(Refused::Wrong);
    }
    if now < expires { Ok(()) } else { Err(Refused::Expired) }
}

fn parse(token: &[u8]) -> Option<(u64, [u8; CODE_LEN])> {
    let (expires, code) = std::str::from_utf8(token).ok()?.split_once('.')?;
    // `parse` alone would take a plus sign, and zeros in front would make two tokens of one.
    let number: u64 = expires.parse().ok().filter(|number: &u64| number.to_string() == expires)?;
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, []) = code.as_bytes().as_chunks::<2>() else { return None };
    let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect::<Option<Vec<u8>>>()?;
    Some((number, bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front_door::link::Link;
    use crate::front_door::registry::Token;
    use std::sync::Arc;

    fn attached() -> Attached {
        Attached {
            link: Arc::new(Link::new()),
            socket: "/x".into(),
            generation: 1,
            token: Arc::new(Token::new("f00d".to_owned())),
            defaults: Arc::default(),
            public_ports: Arc::default(),
        }
    }

    /// Made by another implementation:
    /// `hmac.new(b"f00d", b"port:sb-abc:8000:2000000000", "sha256").hexdigest()` in Python.
    const MADE: &str = "2000000000.a7d0382cd326062fdb236707183c5643f76afbdd095722378fd7af6f1f83f180";

    #[test]
    fn a_token_opens_its_port_until_it_ends() {
        let attached = attached();
        let at = |now| check_at(&attached, "sb-abc", 8000, MADE.as_bytes(), now);
        assert_eq!(at(0), Ok(()));
        assert_eq!(at(1_999_999_999), Ok(()));
        assert_eq!(at(2_000_000_000), Err(Refused::Expired));
        assert_eq!(check(&attached, "sb-abc", 8000, b"f00d"), Ok(()));
        assert_eq!(check(&attached, "sb-abc", 8000, MADE.as_bytes()), Ok(()));
    }

    #[test]
    fn a_token_opens_nothing_else() {
        let attached = attached();
        assert_eq!(check_at(&attached, "sb-abc", 8001, MADE.as_bytes(), 0), Err(Refused::Wrong));
        assert_eq!(check_at(&attached, "sb-abd", 8000, MADE.as_bytes(), 0), Err(Refused::Wrong));
        let (expires, code) = MADE.split_once('.').unwrap();
        for bad in [
            String::new(),
            "f00d".to_owned(),
            ".".to_owned(),
            "f00".to_owned(),
            "f00dd".to_owned(),
            format!("2000000001.{code}"),
            format!("02000000000.{code}"),
            format!("+2000000000.{code}"),
            format!("{expires}.{}", code.to_uppercase()),
            format!("{expires}.{}", &code[..62]),
            format!("{expires}.{}", &code[..63]),
            format!("{expires}.{code}0"),
            format!("{expires}.{code}00"),
            format!("{expires}.{}1", &code[..63]),
            format!("{expires}.0{}", &code[1..]),
            format!("99999999999999999999.{code}"),
            code.to_owned(),
        ] {
            assert_eq!(check_at(&attached, "sb-abc", 8000, bad.as_bytes(), 0), Err(Refused::Wrong), "{bad}");
        }
        assert_eq!(check_at(&attached, "sb-abc", 8000, b"\xff.\xff", 0), Err(Refused::Wrong));
    }
}
