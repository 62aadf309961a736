//! Files of a sandbox: read, write, list, pack.

use super::body::{Body, DownloadBody};
use super::exec::{json_response, no_content};
use super::link::{Channel, Role};
use super::problem::Problem;
use super::registry::Attached;
use super::request::{Query, check_path, json};
use super::upload::{forward, settle};
use hyper::Response;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde::{Deserialize, Serialize};
use shoal_wire::{
    EOF, FileChange, FileInfo, FileKind, FileList, FileListing, FileRead, FileRename, FileUnpack, FileWatch, FileWrite,
    Kind, PathRequest,
};

/// `types.FileInfo`.
#[derive(Serialize)]
struct Info {
    path: String,
    kind: &'static str,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: f64,
    target: Option<String>,
}

impl From<FileInfo> for Info {
    fn from(info: FileInfo) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "the client's type is a float; it keeps the microseconds")]
        let mtime = info.mtime_ns as f64 / 1e9;
        Self {
            path: String::from_utf8_lossy(&info.path).into_owned(),
            kind: info.kind.word(),
            size: info.size,
            mode: info.mode,
            uid: info.uid,
            gid: info.gid,
            mtime,
            target: (info.kind == FileKind::Symlink).then(|| String::from_utf8_lossy(&info.target).into_owned()),
        }
    }
}

fn info_response(answer: &[u8]) -> Result<Response<Body>, Problem> {
    let info = FileInfo::decode(answer).map_err(|_| Problem::garbled())?;
    Ok(json_response(&Info::from(info)))
}

/// `GET files/content`.
pub async fn read(attached: &Attached, mut query: Query) -> Result<Response<Body>, Problem> {
    let request = FileRead {
        path: query.path("path")?,
        offset: query.number("offset")?.unwrap_or(0),
        length: query.number("length")?.unwrap_or(u64::MAX),
    };
    let framed = query.flag("framed", false)?;
    query.finish()?;
    let channel = attached.link.open(Role::Download, Kind::FileRead, request.encode()).await?;
    let answer = settle(channel.head().await, Problem::path)?;
    let info = FileInfo::decode(&answer).map_err(|_| Problem::garbled())?;
    // Files of /proc say that they are empty and are not; a device has no length at all.
    let length = (info.kind == FileKind::File && info.size > 0)
        .then(|| info.size.saturating_sub(request.offset).min(request.length));
    Ok(download(channel, length, framed, "application/octet-stream"))
}

/// `PUT files/content`.
pub async fn write(attached: &Attached, mut query: Query, body: &mut Incoming) -> Result<Response<Body>, Problem> {
    let request = FileWrite {
        path: query.path("path")?,
        mode: query.mode("mode")?.unwrap_or(u32::MAX),
        user: query.user("user")?,
        parents: query.flag("parents", false)?,
    };
    query.finish()?;
    let channel = attached.link.open(Role::Upload, Kind::FileWrite, request.encode()).await?;
    info_response(&forward(&channel, body, EOF, Problem::path).await?)
}

/// `GET files/info`.
pub async fn info(attached: &Attached, mut query: Query) -> Result<Response<Body>, Problem> {
    let request = PathRequest { path: query.path("path")?, ..PathRequest::default() };
    query.finish()?;
    info_response(&attached.call(Role::Call, Kind::FileStat, request.encode(), Problem::path).await?)
}

#[derive(Serialize)]
struct FilePage {
    entries: Vec<Info>,
}

/// `GET files/list`.
pub async fn list(attached: &Attached, mut query: Query) -> Result<Response<Body>, Problem> {
    let path = query.path("path")?;
    let depth = query.number("depth")?.unwrap_or(1);
    query.finish()?;
    let depth = u32::try_from(depth).ok().filter(|depth| *depth > 0);
    let depth = depth.ok_or_else(|| Problem::invalid("depth is out of range").hint("1 lists the directory itself"))?;
    let request = FileList { path, depth };
    let answer = attached.call(Role::Listing, Kind::FileList, request.encode(), Problem::path).await?;
    let mut listing = FileListing::decode(&answer).map_err(|_| Problem::garbled())?;
    listing.entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(json_response(&FilePage { entries: listing.entries.into_iter().map(Info::from).collect() }))
}

/// `POST files/directory`.
pub async fn make_directory(attached: &Attached, mut query: Query) -> Result<Response<Body>, Problem> {
    let request = PathRequest {
        path: query.path("path")?,
        user: query.user("user")?,
        bits: u32::from(query.flag("parents", false)?),
    };
    query.finish()?;
    info_response(&attached.call(Role::Call, Kind::FileMakeDir, request.encode(), Problem::path).await?)
}

/// `DELETE files`.
pub async fn remove(attached: &Attached, mut query: Query) -> Result<Response<Body>, Problem> {
    let request =
        PathRequest { path: query.path("path")?, user: Vec::new(), bits: u32::from(query.flag("recursive", false)?) };
    query.finish()?;
    attached.call(Role::Call, Kind::FileRemove, request.encode(), Problem::path).await?;
    Ok(no_content())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RenameRequest {
    from: String,
    to: String,
}

/// `POST files/rename`.
pub async fn rename(attached: &Attached, query: Query, body: &mut Incoming) -> Result<Response<Body>, Problem> {
    query.finish()?;
    let RenameRequest { from, to } = json(body).await?;
    check_path("from", from.as_bytes())?;
    check_path("to", to.as_bytes())?;
    let request = FileRename { from: from.into_bytes(), to: to.into_bytes() };
    attached.call(Role::Call, Kind::FileRename, request.encode(), Problem::path).await?;
    Ok(no_content())
}

/// `GET files/archive`.
pub async fn pack(attached: &Attached, mut query: Query) -> Result<Response<Body>, Problem> {
    let request = PathRequest { path: query.path("path")?, ..PathRequest::default() };
    let framed = query.flag("framed", false)?;
    query.finish()?;
    let channel = attached.link.open(Role::Download, Kind::FilePack, request.encode()).await?;
    settle(channel.head().await, Problem::path)?;
    Ok(download(channel, None, framed, "application/x-tar"))
}

/// `PUT files/archive`.
pub async fn unpack(attached: &Attached, mut query: Query, body: &mut Incoming) -> Result<Response<Body>, Problem> {
    let request = FileUnpack { path: query.path("path")?, user: query.user("user")? };
    query.finish()?;
    let channel = attached.link.open(Role::Upload, Kind::FileUnpack, request.encode()).await?;
    forward(&channel, body, EOF, Problem::path).await?;
    Ok(no_content())
}

/// `GET files/watch`.
pub async fn watch(attached: &Attached, mut query: Query) -> Result<Response<Body>, Problem> {
    let request = FileWatch { path: query.path("path")?, recursive: query.flag("recursive", true)? };
    query.finish()?;
    let channel = attached.link.open(Role::Download, Kind::FileWatch, request.encode()).await?;
    settle(channel.head().await, Problem::watch)?;
    Ok(download(channel, None, false, "application/x-ndjson"))
}

/// `POST files/attributes`.
pub async fn change(attached: &Attached, mut query: Query) -> Result<Response<Body>, Problem> {
    let (mode, user) = (query.mode("mode")?, query.user("user")?);
    let request = FileChange { path: query.path("path")?, mode: mode.unwrap_or(u32::MAX), user };
    query.finish()?;
    if mode.is_none() && request.user.is_empty() {
        return Err(Problem::invalid("there is nothing to change").hint("give mode, user, or both"));
    }
    info_response(&attached.call(Role::Call, Kind::FileChange, request.encode(), Problem::path).await?)
}

/// Answers with what comes on a channel; `framed`: as frames of an exec's stream, so that an error on the way is told.
fn download(channel: Channel, length: Option<u64>, framed: bool, content_type: &'static str) -> Response<Body> {
    let content_type = if framed { "application/vnd.shoal.stream" } else { content_type };
    let mut response = Response::new(Body::Download(DownloadBody::new(channel, length, framed)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
