//! JSON lines on stderr, one event each: a past-tense fact with keys.

use serde_json::{Map, Value};
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// A state changed.
pub fn info(event: &str, fields: &[(&str, Value)]) {
    write("info", event, fields);
}

/// A person should look at this.
pub fn warning(event: &str, fields: &[(&str, Value)]) {
    write("warning", event, fields);
}

fn write(level: &str, event: &str, fields: &[(&str, Value)]) {
    let mut line = Map::new();
    line.insert("timestamp".to_owned(), now().into());
    line.insert("level".to_owned(), level.into());
    line.insert("process".to_owned(), "front_door".into());
    line.insert("event".to_owned(), event.into());
    for (key, value) in fields {
        line.insert((*key).to_owned(), value.clone());
    }
    let mut text = Value::Object(line).to_string();
    text.push('\n');
    // Nobody is left to be told when stderr itself is gone.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Now in UTC, as RFC 3339 with microseconds.
fn now() -> String {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    rfc3339(elapsed.as_secs(), elapsed.subsec_micros())
}

/// Source: the days-to-civil algorithm of Howard Hinnant, "chrono-compatible low-level date algorithms".
fn rfc3339(seconds: u64, micros: u32) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_time_reads_as_rfc3339() {
        assert_eq!(super::rfc3339(0, 0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(super::rfc3339(951_827_696, 7), "2000-02-29T12:34:56.000007Z");
        assert_eq!(super::rfc3339(1_767_225_599, 999_999), "2025-12-31T23:59:59.999999Z");
    }
}
