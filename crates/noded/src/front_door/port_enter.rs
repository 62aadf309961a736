//! The page that lets a browser in: it hands the token behind the `#` of its address to us, and goes on.
//!
//! What stands behind the `#` never leaves the browser by itself, so a token is in no request line, no log and no
//! Referer.

use super::body::Body;
use hyper::Response;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};

/// Runs with the origin of whatever the port serves, so it goes on to a path of this origin and nowhere else.
const SCRIPT: &str = r#"
const given = new URLSearchParams(location.hash.slice(1));
history.replaceState(null, "", location.pathname);
const say = (text) => { document.body.textContent = text; };
let next = new URL("/", location.origin);
try { next = new URL(given.get("next") ?? "/", location.origin); } catch {}
fetch("/.shoal/enter", { method: "POST", body: given.get("token") ?? "" }).then(
  (answer) => {
    if (answer.status !== 204) say("This link is no longer good. Ask for a new one.");
    else if (next.origin !== location.origin) say("This link leads to another site.");
    else location.replace(next.href);
  },
  () => say("The node does not answer."),
);
"#;

/// Nothing but [`SCRIPT`] runs, and it can ask this origin alone. A test holds the hash to the script.
const POLICY: &str = "default-src 'none'; script-src 'sha256-GutFkPTxXFmzT8rKY3wYpnD6hcd5p/RxQWewfo9iTAQ='; connect-src 'self'; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'";

/// `GET /.shoal/enter`.
pub fn page() -> Response<Body> {
    let html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Opening</title>\
         <body>Opening…<noscript> This page needs JavaScript.</noscript><script>{SCRIPT}</script></body></html>\n"
    );
    let mut response = Response::new(Body::full(html.into_bytes()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest as _, Sha256};

    fn base64(bytes: &[u8]) -> String {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digits = bytes.chunks(3).flat_map(|chunk| {
            let word = chunk.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
            let used = chunk.len() + 1;
            (0..4).map(move |i| if i < used { ALPHABET[(word >> (18 - 6 * i)) as usize & 63] } else { b'=' })
        });
        digits.map(char::from).collect()
    }

    #[test]
    fn the_policy_lets_this_script_run_and_no_other() {
        assert_eq!(base64(b"fooba"), "Zm9vYmE=");
        let hash = base64(&Sha256::digest(SCRIPT));
        assert!(POLICY.contains(&format!("script-src 'sha256-{hash}';")), "the script's hash is {hash}");
    }
}
