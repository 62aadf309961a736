//! What the keeper does once: everything that needs the host's file system, before it leaves it.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::UnixListener;

use super::cgroup::{self, Cgroups};
use super::error::{Error, Result};
use super::ids::Ids;
use super::pool::Pool;
use super::processes::{self, Child, Listeners, Starter};
use super::rpc::Epoll;
use super::runtimes::native::{self, Native};
use super::spec::{DOOR_ID, IdMapping, LayerUnpack, UNPACK_ID};
use super::sys::{self, FsContext};
use super::{Options, log, unpack, userns};

/// A node that is up.
pub struct Node {
    pub epoll: Epoll,
    pub signals: OwnedFd,
    pub server_end: OwnedFd,
    pub server: Child,
    pub door: Child,
    pub pool: Pool,
    pub cgroups: Cgroups,
    pub native: Native,
    pub ids: Ids,
    pub run_dir: String,
    /// Where the front door listens on TCP.
    pub listen: Option<SocketAddr>,
    pub starter: Starter,
    /// Held for as long as the keeper lives: one node a run directory, and one a data directory.
    _locks: [OwnedFd; 2],
    _favor: Option<OwnedFd>,
}

const SOCKETS: [&str; 3] = ["shoal.sock", "server.sock", "door.sock"];

/// Brings the node up.
pub fn node(options: &Options) -> Result<Node> {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        return Err(Error::other("host_unsupported", "the keeper needs root"));
    }
    close_on_exec()?;
    let ids = Ids::open("/run/shoal-ids.lock")?;
    let run = sys::open(&options.run_dir, libc::O_RDONLY | libc::O_DIRECTORY)?;
    let run_lock = lock(&options.run_dir)?;
    // Before the group is emptied and the pool mounted: both may be a live node's. By its real name, whatever the caller
    // called it.
    let data_dir =
        std::fs::canonicalize(&options.data_dir).map_err(|error| Error::io("realpath", &options.data_dir, &error))?;
    let data_dir = data_dir.to_string_lossy().into_owned();
    let data_lock = lock(&data_dir)?;
    // The front door has to pass through it; what it holds is closed to others one by one.
    std::fs::set_permissions(&options.run_dir, std::fs::Permissions::from_mode(0o711))
        .map_err(|error| Error::io("chmod", &options.run_dir, &error))?;
    raise_limits()?;
    let signals = signals()?;
    leave_keyring();
    // Better now than at the first create.
    userns::make(&[IdMapping { container_id: 0, host_id: UNPACK_ID, size: 1 }]).map_err(|error| error.at("userns"))?;
    let host_mounts = sys::open("/proc/self/ns/mnt", libc::O_RDONLY)?;
    // SAFETY: plain numbers and null pointers where mount(2) wants none.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) < 0 {
            return Err(Error::last("unshare", "CLONE_NEWNS"));
        }
        let none = std::ptr::null();
        if libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) < 0 {
            return Err(Error::last("mount", "private"));
        }
    }
    let agent = processes::seal_agent(&options.agent)?;
    let group = format!("shoal-{:08x}", hash(data_dir.as_bytes()));
    let cgroups = Cgroups::open(&group).map_err(|error| error.at("cgroup"))?;
    let favor = cgroup::favor_moves();
    if let Err(error) = &favor {
        // Creates and execs are slower without, nothing else.
        log("favordynmods_unavailable", &serde_json::json!({ "error": error }));
    }
    let pool_mount = Pool::open(&options.pool).map_err(|error| error.at("pool"))?;
    for name in SOCKETS {
        remove_socket(&options.run_dir, name)?;
    }
    let agents = agents_dir(&options.run_dir)?;
    let mut public = vec![listen(&options.run_dir, "shoal.sock", None)?];
    let tcp = options.listen.as_deref().map(listen_tcp).transpose().map_err(|error| error.at("listen"))?;
    let listen_at = tcp.as_ref().map(|(_, address)| *address);
    public.extend(tcp.map(|(listener, _)| listener));
    let control = listen(&options.run_dir, "door.sock", None)?;
    let server = listen(&options.run_dir, "server.sock", Some(DOOR_ID))?;
    let starter = Starter::new(options, host_mounts, run, Listeners { public, control, server })?;
    let door = starter.door().map_err(|error| error.at("front_door"))?;
    let (server, server_end) = start_server(&starter).map_err(|error| error.at("server"))?;

    small_root(&options.run_dir, &pool_mount).map_err(|error| error.at("root"))?;
    let pool = Pool::take("/pool").map_err(|error| error.at("pool"))?;
    let native = Native::new(agent, agents)?;
    log("started", &serde_json::json!({ "data_dir": options.data_dir, "run_dir": options.run_dir, "group": group }));
    Ok(Node {
        epoll: Epoll::new()?,
        signals,
        server_end,
        server,
        door,
        pool,
        cgroups,
        native,
        ids,
        run_dir: options.run_dir.clone(),
        listen: listen_at,
        starter,
        _locks: [run_lock, data_lock],
        _favor: favor.ok(),
    })
}

impl Node {
    /// Starts the worker that unpacks a layer into a fresh, limited directory of its own.
    pub fn unpack(&self, what: &LayerUnpack, blob: &OwnedFd) -> Result<unpack::Worker> {
        let target = self.pool.make_layer(&what.layer, what.max_bytes)?;
        unpack::spawn(&unpack::Request {
            blob: blob.as_fd(),
            length: what.length,
            target: target.as_fd(),
            host_id: UNPACK_ID,
            max_bytes: what.max_bytes,
            max_entries: what.max_entries,
            cpu_seconds: what.deadline_ms.div_ceil(1000),
        })
    }

    /// The signals that came in.
    pub fn take_signals(&self) -> Vec<i32> {
        let mut found = Vec::new();
        loop {
            // SAFETY: all-zero is a valid signalfd_siginfo, which the kernel fills.
            let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
            let size = std::mem::size_of_val(&info);
            // SAFETY: room for one structure.
            let count = unsafe { libc::read(self.signals.as_raw_fd(), (&raw mut info).cast(), size) };
            if count != size as isize {
                return found;
            }
            found.push(info.ssi_signo as i32);
        }
    }

    /// Removes the node's sockets.
    pub fn remove_sockets(&self) {
        for name in SOCKETS {
            if let Ok(c_name) = sys::c_string(name) {
                // SAFETY: the name ends in NUL. One that is gone already is what we want.
                unsafe { libc::unlinkat(self.starter.run.as_raw_fd(), c_name.as_ptr(), 0) };
            }
        }
    }
}

/// Starts a server; the keeper's end of a fresh conversation with it.
pub fn start_server(starter: &Starter) -> Result<(Child, OwnedFd)> {
    let (keeper_end, server_end) = seqpacket()?;
    Ok((starter.server(server_end.as_fd())?, keeper_end))
}

/// Release of the running kernel.
pub fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Leaves the host's file system for a tmpfs with nothing in it but what sandboxes are made from.
///
/// Every sandbox starts with a copy of the keeper's mounts, so four of them are also faster than the host's.
fn small_root(run_dir: &str, pool: &OwnedFd) -> Result<()> {
    let context = FsContext::open("tmpfs")?;
    context.set("source", "shoal")?;
    context.set("size", "1m")?;
    context.set("mode", "0700")?;
    let root = context.mount(sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV | sys::MOUNT_ATTR_NOEXEC)?;
    for name in ["proc", "pool", "dev"] {
        sys::mkdirat(root.as_fd(), name, 0o755)?;
    }
    sys::mkdirat(root.as_fd(), native::NEW_ROOT.to_string_lossy().trim_start_matches('/'), 0o555)?;
    let devices = native::device_mount()?;
    let proc =
        FsContext::open("proc")?.mount(sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV | sys::MOUNT_ATTR_NOEXEC)?;
    // In this namespace nobody else sees the run directory, so it can serve as the place to stand on.
    sys::move_mount(root.as_fd(), run_dir)?;
    for (mount, place) in [(&proc, "proc"), (pool, "pool"), (&devices, "dev")] {
        sys::move_mount(mount.as_fd(), &format!("{run_dir}/{place}"))?;
    }
    std::env::set_current_dir(run_dir).map_err(|error| Error::io("chdir", run_dir, &error))?;
    // SAFETY: both strings end in NUL.
    unsafe {
        if libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) < 0 {
            return Err(Error::last("pivot_root", run_dir));
        }
        if libc::umount2(c".".as_ptr(), libc::MNT_DETACH) < 0 {
            return Err(Error::last("umount2", run_dir));
        }
    }
    std::env::set_current_dir("/").map_err(|error| Error::io("chdir", "/", &error))?;
    sys::mount_setattr(root.as_fd(), sys::MOUNT_ATTR_RDONLY, None)
}

/// Whatever the keeper was started with is nobody else's.
fn close_on_exec() -> Result<()> {
    // SAFETY: plain numbers; changes no descriptor but its flag.
    if unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) } < 0 {
        return Err(Error::last("close_range", ""));
    }
    Ok(())
}

fn lock(dir: &str) -> Result<OwnedFd> {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(format!("{dir}/node.lock"))
        .map_err(|error| Error::io("open", "node.lock", &error))?;
    // SAFETY: an open descriptor.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0 {
        return Err(Error::other("conflict", format!("another node uses {dir}")));
    }
    Ok(file.into())
}

/// Descriptors for ten thousand sandboxes, here and in what is started from here, as far as the host allows.
fn raise_limits() -> Result<()> {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    let most = most.unwrap_or(65_536_u64).min(1 << 20);
    let mut limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: one structure in each call.
    unsafe {
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0 {
            return Ok(());
        }
        // A root without CAP_SYS_RESOURCE raises no hard limit.
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) < 0 {
            return Err(Error::last("setrlimit", "RLIMIT_NOFILE"));
        }
    }
    Ok(())
}

fn signals() -> Result<OwnedFd> {
    // SAFETY: an empty set is filled before it is used; the descriptor is new.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGPIPE] {
            libc::sigaddset(&raw mut set, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(Error::last("sigprocmask", ""));
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(Error::last("signalfd", ""));
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Leaves the session keyring of whoever started the node, so that no sandbox inherits it.
fn leave_keyring() {
    const JOIN_SESSION_KEYRING: i32 = 1;
    // A kernel without keyrings has none to leave.
    // SAFETY: a null name makes an anonymous keyring.
    unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>()) };
}

fn agents_dir(run_dir: &str) -> Result<OwnedFd> {
    let path = format!("{run_dir}/agents");
    match std::fs::create_dir(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io("mkdir", &path, &error));
        }
        _ => {}
    }
    let dir = sys::open(&path, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW)?;
    let entries = std::fs::read_dir(&path).map_err(|error| Error::io("opendir", &path, &error))?;
    for entry in entries.flatten() {
        std::fs::remove_file(entry.path()).map_err(|error| Error::io("unlink", &path, &error))?;
    }
    chown(&path, Some(DOOR_ID), Some(DOOR_ID)).map_err(|error| Error::io("chown", &path, &error))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))
        .map_err(|error| Error::io("chmod", &path, &error))?;
    Ok(dir)
}

fn remove_socket(run_dir: &str, name: &str) -> Result<()> {
    match std::fs::remove_file(format!("{run_dir}/{name}")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("unlink", name, &error)),
        _ => Ok(()),
    }
}

fn listen(run_dir: &str, name: &str, owner: Option<u32>) -> Result<OwnedFd> {
    let path = format!("{run_dir}/{name}");
    // SAFETY: plain numbers. The socket is closed to others from its first moment on.
    let before = unsafe { libc::umask(0o177) };
    let bound = UnixListener::bind(&path).map_err(|error| Error::io("bind", &path, &error));
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    let listener: OwnedFd = bound?.into();
    // SAFETY: an open socket; a longer queue for bursts of connections.
    if unsafe { libc::listen(listener.as_raw_fd(), 4096) } < 0 {
        return Err(Error::last("listen", path));
    }
    if let Some(owner) = owner {
        chown(&path, Some(owner), Some(owner)).map_err(|error| Error::io("chown", &path, &error))?;
    }
    Ok(listener)
}

/// Listens on TCP, on an address that only this machine reaches; port 0 is any free one.
fn listen_tcp(place: &str) -> Result<(OwnedFd, SocketAddr)> {
    let wanted = place
        .parse::<SocketAddr>()
        .ok()
        .filter(|address| address.ip().is_loopback())
        .ok_or_else(|| Error::invalid(format!("--listen takes a loopback address and a port, not {place:?}")))?;
    let listener = TcpListener::bind(wanted).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Error::other("conflict", format!("another program listens on {wanted}")),
        _ => Error::io("bind", place, &error),
    })?;
    let address = listener.local_addr().map_err(|error| Error::io("getsockname", place, &error))?;
    // SAFETY: an open socket; a longer queue for bursts of connections.
    if unsafe { libc::listen(listener.as_raw_fd(), 4096) } < 0 {
        return Err(Error::last("listen", place));
    }
    Ok((listener.into(), address))
}

fn seqpacket() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    let made =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) };
    if made < 0 {
        return Err(Error::last("socketpair", ""));
    }
    let room: i32 = 4 << 20;
    for end in ends {
        // SAFETY: one int. Forced, as root may, so that a list of ten thousand sandboxes fits.
        unsafe {
            libc::setsockopt(end, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, (&raw const room).cast(), 4);
        }
    }
    // SAFETY: the kernel has just made both for us.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// FNV-1a, 32 bits: names the node's group after its data directory.
fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}
