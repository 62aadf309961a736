//! Reading of requests: paths, queries, JSON bodies. All of it strict.

use super::problem::Problem;
use hyper::body::{Body as _, Incoming};
use serde::de::DeserializeOwned;
use std::future::poll_fn;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::timeout;

/// Longest JSON body.
pub const MAX_JSON: usize = 8 << 20;

/// How long a JSON body may take to arrive.
const BODY_DEADLINE: Duration = Duration::from_mins(1);

/// Decodes `%XX`; `plus` also turns `+` into a space, as queries have it.
pub fn percent_decode(text: &str, plus: bool) -> Result<Vec<u8>, Problem> {
    let bad = || Problem::invalid(format!("malformed percent-encoding in {text:?}"));
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16)).ok_or_else(bad);
                let (high, low) = (digit()?, digit()?);
                (high * 16 + low) as u8
            }
            b'+' if plus => b' ',
            byte => byte,
        });
    }
    Ok(out)
}

/// The parameters of a query; each may be given once, and all must be known.
pub struct Query(Vec<(String, Vec<u8>)>);

impl Query {
    /// Reads what stands behind the `?`.
    pub fn parse(query: Option<&str>) -> Result<Self, Problem> {
        let mut pairs: Vec<(String, Vec<u8>)> = Vec::new();
        for part in query.unwrap_or_default().split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let name = String::from_utf8(percent_decode(name, true)?)
                .map_err(|_| Problem::invalid("a parameter's name is not UTF-8"))?;
            if pairs.iter().any(|(known, _)| *known == name) {
                return Err(Problem::invalid(format!("parameter {name} is given twice")));
            }
            pairs.push((name, percent_decode(value, true)?));
        }
        Ok(Self(pairs))
    }

    /// Takes a parameter's bytes.
    pub fn bytes(&mut self, name: &str) -> Option<Vec<u8>> {
        let index = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.swap_remove(index).1)
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, Problem> {
        let Some(value) = self.bytes(name) else { return Ok(None) };
        String::from_utf8(value).map(Some).map_err(|_| Problem::invalid(format!("{name} is not UTF-8")))
    }

    /// Takes a number that is not negative.
    pub fn number(&mut self, name: &str) -> Result<Option<u64>, Problem> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        // `parse` alone would take a plus sign.
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        match text.parse() {
            Ok(number) if digits => Ok(Some(number)),
            _ => Err(Problem::invalid(format!("{name} is {text:?}, not a whole number from 0"))),
        }
    }

    /// Takes a time in seconds, with a fraction if need be.
    pub fn seconds(&mut self, name: &str) -> Result<Option<Duration>, Problem> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let seconds = text.parse().ok().filter(|_| plain).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        seconds.map(Some).ok_or_else(|| Problem::invalid(format!("{name} is {text:?}, not a time in seconds")))
    }

    /// Takes `true` or `false`.
    pub fn flag(&mut self, name: &str, default: bool) -> Result<bool, Problem> {
        match self.text(name)?.as_deref() {
            None => Ok(default),
            Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(Problem::invalid(format!("{name} is {other:?}, neither true nor false"))),
        }
    }

    /// Takes permission bits, in octal.
    pub fn mode(&mut self, name: &str) -> Result<Option<u32>, Problem> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let octal = (1..=5).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match u32::from_str_radix(&text, 8) {
            Ok(mode) if octal && mode <= 0o7777 => Ok(Some(mode)),
            _ => Err(Problem::invalid(format!("{name} is {text:?}, not octal permission bits"))
                .hint("write it as in chmod(1): 0644")),
        }
    }

    /// Takes the absolute path that every file route needs.
    pub fn path(&mut self, name: &str) -> Result<Vec<u8>, Problem> {
        let path = self.bytes(name).ok_or_else(|| Problem::invalid(format!("parameter {name} is missing")))?;
        check_path(name, &path)?;
        Ok(path)
    }

    /// Takes the name of a user, or nothing.
    pub fn user(&mut self, name: &str) -> Result<Vec<u8>, Problem> {
        let user = self.bytes(name).unwrap_or_default();
        check_no_nul(name, &user)?;
        Ok(user)
    }

    /// Ends reading: whatever is left is a mistake.
    pub fn finish(self) -> Result<(), Problem> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(Problem::invalid(format!("unknown parameter {name:?}"))),
        }
    }
}

/// Refuses a string that the kernel would cut short.
pub fn check_no_nul(what: &str, value: &[u8]) -> Result<(), Problem> {
    if value.contains(&0) {
        return Err(Problem::invalid(format!("{what} has a NUL byte in it")));
    }
    Ok(())
}

/// Refuses a path that is not absolute, or that the kernel would cut short.
pub fn check_path(what: &str, path: &[u8]) -> Result<(), Problem> {
    if path.first() != Some(&b'/') {
        let shown = String::from_utf8_lossy(path);
        return Err(
            Problem::invalid(format!("{what} {shown:?} is not absolute")).hint("paths in a sandbox begin with a slash")
        );
    }
    check_no_nul(what, path)
}

/// Refuses an exec id that is not one. It stands in paths, where `.` and `..` mean something else.
pub fn check_exec_id(id: &str) -> Result<(), Problem> {
    let fits = (1..=128).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
        && !matches!(id, "." | "..");
    if fits {
        return Ok(());
    }
    Err(Problem::invalid(format!("exec id {id:?} is none"))
        .hint("1 to 128 of the characters A-Z a-z 0-9 _ . -, and neither `.` nor `..`"))
}

/// Reads a whole JSON body.
pub async fn json<T: DeserializeOwned>(body: &mut Incoming) -> Result<T, Problem> {
    let bytes = timeout(BODY_DEADLINE, collect(body, MAX_JSON)).await.map_err(|_| Problem::body_timeout())??;
    serde_json::from_slice(&bytes).map_err(|error| Problem::invalid(format!("body: {error}")))
}

/// Reads a whole body of text.
pub async fn text(body: &mut Incoming, limit: usize) -> Result<String, Problem> {
    let bytes = timeout(BODY_DEADLINE, collect(body, limit)).await.map_err(|_| Problem::body_timeout())??;
    String::from_utf8(bytes).map_err(|_| Problem::invalid("the body is not UTF-8"))
}

async fn collect(body: &mut Incoming, limit: usize) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    if body.size_hint().lower() > limit as u64 {
        return Err(Problem::body_too_large(limit));
    }
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
        let frame = frame.map_err(|error| Problem::invalid(format!("body: {error}")))?;
        if let Ok(data) = frame.into_data() {
            if bytes.len() + data.len() > limit {
                return Err(Problem::body_too_large(limit));
            }
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes)
}

/// Reads and drops what a client still sends of a body that nobody wants, within limits, so that it gets to read
/// the answer instead of a broken pipe.
pub async fn drain(body: &mut Incoming) {
    const MOST: usize = 64 << 20;
    const LONGEST: Duration = Duration::from_secs(2);
    let drop_it = async {
        let mut dropped = 0;
        while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
            dropped += frame.data_ref().map_or(0, bytes::Bytes::len);
            if dropped > MOST {
                return;
            }
        }
    };
    // Whoever sends more, or slower, sees the connection closed.
    let _ = timeout(LONGEST, drop_it).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_is_read_strictly() {
        assert_eq!(percent_decode("a%20b+c%2F", true).unwrap(), b"a b c/");
        assert_eq!(percent_decode("a+b%ff", false).unwrap(), b"a+b\xff");
        for bad in ["%", "%2", "%zz", "%+1", "a%2"] {
            assert!(percent_decode(bad, true).is_err(), "{bad} was decoded");
        }
    }

    #[test]
    fn a_query_takes_each_known_parameter_once() {
        let mut query = Query::parse(Some("path=%2Fa&offset=7&parents=true&mode=0755")).unwrap();
        assert_eq!(query.path("path").unwrap(), b"/a");
        assert_eq!(query.number("offset").unwrap(), Some(7));
        assert_eq!(query.mode("mode").unwrap(), Some(0o755));
        assert!(query.flag("parents", false).unwrap());
        query.finish().unwrap();
        assert!(Query::parse(Some("a=1&a=2")).is_err());
        assert!(Query::parse(Some("a=1")).unwrap().finish().is_err());
    }

    #[test]
    fn numbers_modes_and_paths_are_not_guessed() {
        for bad in ["n=+1", "n=-1", "n=", "n=1e3", "n=99999999999999999999"] {
            assert!(Query::parse(Some(&bad.replace('+', "%2B"))).unwrap().number("n").is_err(), "{bad}");
        }
        for bad in ["t=+1", "t=-1", "t=", "t=1e3", "t=inf", "t=.", "t=99999999999999999999"] {
            assert!(Query::parse(Some(&bad.replace('+', "%2B"))).unwrap().seconds("t").is_err(), "{bad}");
        }
        for bad in ["m=0o644", "m=888", "m=17777", "m="] {
            assert!(Query::parse(Some(bad)).unwrap().mode("m").is_err(), "{bad}");
        }
        for bad in ["p=a", "p=", "p=%2Fa%00b"] {
            assert!(Query::parse(Some(bad)).unwrap().path("p").is_err(), "{bad}");
        }
    }
}
