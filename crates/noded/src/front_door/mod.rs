//! The process that strangers talk to: no privileges, no files, one thread.
//!
//! It serves the data plane of every attached sandbox (execs, files, ports) over HTTP/1.1, straight from
//! the client's socket to the guest agent's, and passes everything else to the Python server. The
//! server says over the control socket which sandboxes there are.

mod body;
mod connection;
mod control;
mod exec;
mod files;
mod link;
mod log;
mod outlet;
mod port_enter;
mod port_http;
mod port_stream;
mod port_token;
mod ports;
mod probe;
mod problem;
mod proxy;
mod registry;
mod request;
mod server;
mod stream;
mod upload;

#[cfg(test)]
mod tests;

use control::Peer;
use proxy::Proxy;
use registry::Registry;
use server::Listener;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

/// Descriptors kept back for what is no client's connection: agents, the Python server, the control socket.
const RESERVED_DESCRIPTORS: u64 = 64;

/// How often free memory is given back.
const TRIM_EVERY: Duration = Duration::from_secs(30);

/// How long a broken connection to an agent may stay broken.
const GRACE: Duration = Duration::from_millis(500);

/// How long a raw connection of which one half is closed may be silent.
const HALF_CLOSED: Duration = Duration::from_mins(10);

/// What the front door works with; the keeper opens all of it.
#[derive(Debug)]
pub struct Config {
    /// Listening sockets for clients, unix or TCP.
    pub public: Vec<OwnedFd>,
    /// Listening unix socket for the Python server.
    pub control: OwnedFd,
    /// Where the Python server listens for what is passed on to it.
    pub server_socket: PathBuf,
    /// Client connections at one time; fewer when there are not enough descriptors.
    pub max_connections: usize,
    /// How long a client may take to send the head of a request, and how long its connection may be idle.
    pub header_timeout: Duration,
    /// How long a broken connection to an agent may stay broken before its sandbox is lost.
    pub grace: Duration,
    /// How long a raw connection to a port may be silent once one half of it is closed.
    pub half_closed: Duration,
}

impl Config {
    /// The usual limits.
    pub fn new(public: Vec<OwnedFd>, control: OwnedFd, server_socket: PathBuf) -> Self {
        Self {
            public,
            control,
            server_socket,
            max_connections: 16_384,
            header_timeout: Duration::from_mins(1),
            grace: GRACE,
            half_closed: HALF_CLOSED,
        }
    }
}

/// Everything that the front door's tasks share.
struct Door {
    registry: Registry,
    proxy: Arc<Proxy>,
    connections: Arc<Semaphore>,
    /// Of these, those that come over TCP: strangers who open many shall not lock the owner out.
    from_tcp: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    header_timeout: Duration,
    grace: Duration,
    half_closed: Duration,
    peers: Mutex<Vec<Peer>>,
}

impl Door {
    fn add_peer(&self, peer: Peer) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|peer| !peer.is_closed());
        peers.push(peer);
    }

    /// Sends an event to whoever is connected to the control socket.
    fn tell_peers(&self, line: &str) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        // A peer that does not read misses events; it is not worth memory without end.
        peers.retain(|peer| !peer.is_closed() && peer.try_send(line.to_owned()).is_ok());
    }
}

/// Serves until the process is killed; returns only when it cannot begin.
pub fn run(config: Config) -> ExitCode {
    let Err(error) = start(config);
    log::warning("front_door_failed", &[("error", error.to_string().into())]);
    ExitCode::FAILURE
}

fn start(config: Config) -> io::Result<std::convert::Infallible> {
    let descriptors = raise_descriptor_limit()?;
    // One thread: the kernel moves the bytes and few instructions lie in between, so a second one brought nothing
    // that could be measured on two cores, neither in throughput nor in round trips.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        // Two a connection: a stream's other end is an agent's or the Python server's.
        let affordable = usize::try_from(descriptors.saturating_sub(RESERVED_DESCRIPTORS) / 2).unwrap_or(usize::MAX);
        let max_connections = config.max_connections.min(affordable).max(1);
        let door = Arc::new(Door {
            registry: Registry::default(),
            proxy: Arc::new(Proxy::new(config.server_socket)),
            connections: Arc::new(Semaphore::new(max_connections)),
            from_tcp: Arc::new(Semaphore::new((max_connections / 2).max(1))),
            refusals: Arc::new(Semaphore::new(max_connections.min(64))),
            header_timeout: config.header_timeout,
            grace: config.grace,
            half_closed: config.half_closed,
            peers: Mutex::new(Vec::new()),
        });
        for descriptor in config.public {
            tokio::spawn(server::serve(Arc::clone(&door), listener(descriptor)?));
        }
        let control = std::os::unix::net::UnixListener::from(config.control);
        control.set_nonblocking(true)?;
        log::info("front_door_started", &[("max_connections", max_connections.into())]);
        tokio::spawn(give_memory_back());
        control::serve(door, UnixListener::from_std(control)?).await;
        Err(io::Error::other("the control socket is gone"))
    })
}

/// Returns to the kernel what a burst took: free memory below anything that lives on is not returned by itself.
async fn give_memory_back() {
    loop {
        tokio::time::sleep(TRIM_EVERY).await;
        #[cfg(target_env = "gnu")]
        // SAFETY: it takes no pointer and may be called at any time.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

/// A listening socket of whichever family the descriptor has.
fn listener(descriptor: OwnedFd) -> io::Result<Listener> {
    let mut domain: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `domain` is an int and `length` says so; both outlive the call.
    let asked = unsafe {
        libc::getsockopt(
            descriptor.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DOMAIN,
            (&raw mut domain).cast(),
            &raw mut length,
        )
    };
    if asked != 0 {
        return Err(io::Error::last_os_error());
    }
    if domain == libc::AF_UNIX {
        let socket = std::os::unix::net::UnixListener::from(descriptor);
        socket.set_nonblocking(true)?;
        Ok(Listener::Unix(UnixListener::from_std(socket)?))
    } else {
        let socket = std::net::TcpListener::from(descriptor);
        socket.set_nonblocking(true)?;
        Ok(Listener::Tcp(TcpListener::from_std(socket)?))
    }
}

/// Takes as many descriptors as the hard limit allows, which needs no privilege; returns how many that is.
fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the kernel to fill in.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit, read only.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}
