//! Strictness must not break users: real programs under the filter, with `no_new_privs`, as a sandbox runs them.
//!
//! A program that this machine lacks is passed over; which those were is printed (`--nocapture`).
//!
//! Run by hand as well, on Debian 12, as root with the eleven capabilities in a user namespace: apt-get install
//! with its post-install scripts, pip install, numpy, pytest, chromium --no-sandbox (DOM and screenshot), redis,
//! mariadb (falls back from `io_uring` and aio), nginx, sshd and ssh, php, ruby, erlang, sbcl, valgrind, gpg,
//! fakeroot, useradd, static musl programs with threads.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::{env, fs};

use super::super::{install, standard};

/// Runs a shell script under the filter in an empty directory of its own, where `file` lies.
fn run(name: &str, needs: &[&str], file: Option<(&str, &str)>, script: &str) {
    let path = env::var_os("PATH").unwrap_or_default();
    let missing = |program: &&&str| !env::split_paths(&path).any(|folder| folder.join(program).exists());
    if let Some(program) = needs.iter().find(missing) {
        println!("{name}: passed over, there is no {program} here");
        return;
    }
    let folder = env::temp_dir().join(format!("shoal-seccomp-{}-{name}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    if let Some((name, content)) = file {
        fs::write(folder.join(name), content).unwrap();
    }
    let program = standard();
    let mut command = Command::new("/bin/sh");
    command.args(["-ec", script]).current_dir(&folder).stdin(Stdio::null());
    command.env("TMPDIR", &folder).env("PYTHONDONTWRITEBYTECODE", "1");
    // SAFETY: two system calls, which allocate nothing.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            install(&program)
        })
    };
    let output = command.output().unwrap();
    fs::remove_dir_all(&folder).unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}: {}\n{stdout}\n{stderr}", output.status);
    println!("{name}: ran");
}

#[test]
fn shells_and_core_utilities_run() {
    run("shell", &["bash", "tar", "gzip", "find", "xargs", "ionice"], None, include_str!("programs/shell.sh"));
}

#[test]
fn python_runs_with_processes_threads_asyncio_and_sqlite() {
    run("python", &["python3"], Some(("t.py", include_str!("programs/python.py"))), "python3 t.py");
    run("venv", &["python3"], None, "python3 -m venv --without-pip v; v/bin/python -c 'import ssl, lzma, uuid'");
}

#[test]
fn compilers_run() {
    run("compilers", &["cc", "c++", "make"], None, include_str!("programs/compilers.sh"));
    run("rust", &["rustc"], None, include_str!("programs/rust.sh"));
    run("go", &["go"], None, include_str!("programs/go.sh"));
}

#[test]
fn git_runs() {
    run("git", &["git"], None, include_str!("programs/git.sh"));
}

#[test]
fn node_runs() {
    run("node", &["node"], Some(("t.js", include_str!("programs/node.js"))), "node t.js");
}

#[test]
fn java_runs() {
    run("java", &["java"], None, "java -version; java -XX:+UseG1GC --version");
    run("javac", &["java", "javac"], Some(("A.java", include_str!("programs/A.java"))), "java A.java");
}

#[test]
fn tracers_and_debuggers_run() {
    run("tracers", &["strace", "gdb"], None, include_str!("programs/tracers.sh"));
}

#[test]
fn databases_run() {
    let journal = "sqlite3 a.db 'pragma journal_mode=wal; create table t(x); insert into t values(1); select * from t'";
    run("sqlite", &["sqlite3"], None, journal);
    run("postgres", &["initdb", "pg_ctl", "psql", "setpriv"], None, include_str!("programs/postgres.sh"));
    let redis = "redis-server --unixsocket s --port 0 --daemonize yes; redis-cli -s s set a b; redis-cli -s s shutdown";
    run("redis", &["redis-server", "redis-cli"], None, redis);
}

#[test]
fn other_programs_run() {
    run("perl", &["perl"], None, "perl -MSocket -e 'fork; wait; socket(my $s, AF_INET, SOCK_STREAM, 0) or die'");
    run("tmux", &["tmux"], None, "tmux -S s -f /dev/null new-session -d 'sleep 1'; tmux -S s list-sessions");
    run("network", &["ip", "ss"], None, "ip address show; ip route show; ss -tuln; ss -xl");
    // Asks for the audit socket and must take no for an answer.
    run("passwd", &["passwd"], None, "passwd -S root");
}
