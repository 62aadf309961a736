//! Errors as clients see them: problem+json (RFC 9457) with the codes of `shoal.errors`.

use super::body::Body;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS};
use hyper::{Response, StatusCode};
use serde_json::{Map, Value};
use shoal_wire::Failure;

/// An error on its way to a client.
#[derive(Clone, Debug)]
pub struct Problem {
    code: &'static str,
    status: u16,
    is_infra: bool,
    detail: String,
    hint: &'static str,
    details: Map<String, Value>,
    allow: Option<&'static str>,
}

impl Problem {
    fn new(code: &'static str, status: u16, detail: impl Into<String>) -> Self {
        Self { code, status, is_infra: false, detail: detail.into(), hint: "", details: Map::new(), allow: None }
    }
    fn infra(mut self) -> Self {
        self.is_infra = true;
        self
    }
    /// What to do about it, for a person.
    pub fn hint(mut self, hint: &'static str) -> Self {
        self.hint = hint;
        self
    }
    /// One more fact.
    pub fn fact(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_owned(), value.into());
        self
    }

    /// The request makes no sense.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new("invalid_argument", 400, detail)
    }
    /// The body is larger than the route takes.
    pub fn body_too_large(limit: usize) -> Self {
        Self::new("invalid_argument", 413, format!("body is longer than {limit} bytes"))
    }
    /// The body did not come in time.
    pub fn body_timeout() -> Self {
        Self::new("deadline_exceeded", 408, "the request's body did not arrive in time")
    }
    /// No token, or a wrong one.
    pub fn unauthenticated(detail: &str) -> Self {
        Self::new("unauthenticated", 401, detail)
            .hint("send the sandbox's access token as `Authorization: Bearer …`; create and connect return it")
    }
    /// Nobody may do this from where it came.
    pub fn forbidden(detail: &str) -> Self {
        Self::new("forbidden", 403, detail)
    }
    /// No such sandbox. It does not say which: the answer is the same for all that are not there.
    pub fn sandbox_not_found() -> Self {
        Self::new("sandbox_not_found", 404, "there is no such sandbox")
    }
    /// It did not happen in time.
    pub fn deadline_exceeded(detail: impl Into<String>) -> Self {
        Self::new("deadline_exceeded", 408, detail)
    }
    /// Nobody serves a port.
    pub fn port_unreachable(port: u16, why: &str) -> Self {
        Self::new("port_unreachable", 502, format!("port {port}: {why}"))
            .fact("port", port)
            .hint("start a server in the sandbox that listens on this port, on 127.0.0.1 or all addresses")
    }
    /// No such route.
    pub fn no_route(path: &str) -> Self {
        Self::new("not_found", 404, format!("no route {path}"))
            .hint("paths of the data plane begin with execs, files or ports")
    }
    /// The route exists for other methods.
    pub fn method_not_allowed(method: &str, allow: &'static str) -> Self {
        let mut problem = Self::new("invalid_argument", 405, format!("method {method} is not allowed here"));
        problem.allow = Some(allow);
        problem
    }
    /// Too much is going on.
    pub fn exhausted(detail: impl Into<String>) -> Self {
        Self::new("resource_exhausted", 429, detail)
    }
    /// The state of things forbids it.
    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new("conflict", 409, detail)
    }
    /// The sandbox ended, as its owner or the node wanted.
    pub fn sandbox_gone(reason: Option<&str>) -> Self {
        let problem = Self::new("sandbox_gone", 410, "the sandbox has ended");
        match reason {
            Some(reason) => problem.fact("reason", reason),
            None => problem,
        }
    }
    /// The sandbox ended by no fault of its own.
    pub fn sandbox_lost(detail: impl Into<String>) -> Self {
        Self::new("sandbox_lost", 502, detail).infra().hint("make a new sandbox and try again")
    }
    /// The Python server does not answer.
    pub fn node_unavailable(detail: impl Into<String>) -> Self {
        Self::new("node_unavailable", 503, detail)
            .infra()
            .hint("the node may be starting or stopping: try again, and look into its log if this lasts")
    }
    /// The agent answered with something that makes no sense.
    pub fn garbled() -> Self {
        Self::sandbox_lost("the guest agent's answer makes no sense")
    }

    /// A file operation failed.
    pub fn path(failure: &Failure) -> Self {
        let detail = describe(failure);
        match failure.errno {
            0 => Self::invalid(detail),
            libc::ENOENT => Self::new("path_not_found", 404, detail).fact("errno", failure.errno),
            errno => {
                let hint = match errno {
                    libc::ENOSPC | libc::EDQUOT => {
                        "the sandbox's disk is full: remove something, or give it more disk_mib"
                    }
                    libc::EISDIR => "it is a directory: use the archive or list route",
                    _ => "",
                };
                Self::new("path_error", 422, detail).fact("errno", errno).hint(hint)
            }
        }
    }

    /// A path cannot be watched.
    pub fn watch(failure: &Failure) -> Self {
        match failure.errno {
            libc::ENOSPC | libc::EMFILE | libc::ENFILE | libc::ENOMEM => {
                Self::exhausted(format!("too much is being watched: {}", describe(failure)))
                    .fact("errno", failure.errno)
                    .hint("watch fewer paths or a smaller tree; the kernel's limits are in /proc/sys/fs/inotify")
            }
            _ => Self::path(failure),
        }
    }

    /// An operation on an exec failed.
    pub fn exec(failure: &Failure) -> Self {
        let detail = describe(failure);
        match failure.errno {
            0 | libc::EINVAL => Self::invalid(detail),
            libc::ENOENT => Self::new("exec_not_found", 404, detail),
            libc::ESRCH => Self::conflict(detail).fact("errno", failure.errno).hint("the command has ended"),
            libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC => {
                Self::exhausted(detail).fact("errno", failure.errno)
            }
            libc::EPIPE => Self::conflict(detail)
                .fact("errno", failure.errno)
                .hint("the command has closed its stdin, has ended, or was started without one"),
            errno => Self::conflict(detail).fact("errno", errno),
        }
    }

    /// The stable word of this error.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// What is wrong, for a person.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The document.
    pub fn to_json(&self) -> Vec<u8> {
        let mut document = Map::new();
        document.insert("type".to_owned(), format!("urn:shoal:error:{}", self.code).into());
        document.insert("title".to_owned(), self.code.replace('_', " ").into());
        document.insert("status".to_owned(), self.status.into());
        document.insert("code".to_owned(), self.code.into());
        document.insert("detail".to_owned(), self.detail.clone().into());
        document.insert("is_infra".to_owned(), self.is_infra.into());
        if !self.hint.is_empty() {
            document.insert("hint".to_owned(), self.hint.into());
        }
        if !self.details.is_empty() {
            document.insert("details".to_owned(), self.details.clone().into());
        }
        Value::Object(document).to_string().into_bytes()
    }

    /// The whole answer.
    pub fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::full(self.to_json()));
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        // It repeats parts of the request, and a browser may show it under a port's origin.
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if self.status == 401 {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

/// What the agent says failed, and the kernel's words for it.
pub fn describe(failure: &Failure) -> String {
    /// Longer ones come from no honest agent.
    const LONGEST: usize = 4096;
    let what = failure.what.get(..LONGEST).unwrap_or(&failure.what);
    let what = String::from_utf8_lossy(what);
    if failure.errno == 0 {
        return what.into_owned();
    }
    let words = std::io::Error::from_raw_os_error(failure.errno).to_string();
    let words = words.rsplit_once(" (os error").map_or(words.as_str(), |(words, _)| words).to_lowercase();
    if what.is_empty() { words } else { format!("{what}: {words}") }
}
