//! Commands: their streams, their ends, and what holds when connections break.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod common;

use common::{Agent, Channel, End, Gate, Mode, eventually, exec, is_root, noise, sh};
use shoal_wire::{DETACH, EOF, ExecList, ExecResize, ExecStart, Kind, Outcome, Stage, WINDOW, Writer};
use std::time::Duration;

#[test]
fn ready_is_the_first_frame_of_every_connection() {
    let agent = Agent::start();
    let clients: Vec<_> = (0..5).map(|_| agent.connect()).collect();
    for client in &clients {
        assert_eq!((client.ready.version, client.ready.generation), (shoal_wire::VERSION, 7));
        assert!(client.ready.ready_at_ns > 0);
    }
}

#[test]
fn stdout_stderr_and_the_exit_code_come_apart() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let run = client.run(&sh("a", "echo out; echo err >&2; exit 7"));
    assert_eq!((run.stdout().as_str(), run.stderr().as_str()), ("out\n", "err\n"));
    let exited = run.exited();
    assert_eq!((exited.outcome, exited.code, exited.signal), (Outcome::Exited, 7, 0));
    assert!(exited.wall_ns > 0 && exited.max_rss_kib > 0);
    let started = run.started.as_ref().unwrap();
    assert!(started.pid > 0 && !started.existing);
}

#[test]
fn a_command_sees_a_clean_world() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let script = "ls -l /proc/self/fd | wc -l; grep -E 'SigBlk|SigIgn|SigCgt' /proc/self/status; umask; \
        ps -o pid=,sid=,pgid= -p $$ 2>/dev/null | awk '{print ($1==$2 && $2==$3)}'; env | sort";
    let run = client.run(&ExecStart { env: vec![b"A=b".to_vec()], ..sh("a", script) });
    let text = run.stdout();
    // 0, 1, 2, the one that ls reads the directory with, and the line with the total.
    assert!(text.starts_with("5\n"), "{text}");
    for line in
        ["SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000", "\n0022\n", "A=b\n", "PATH=", "HOME=", "USER="]
    {
        assert!(text.contains(line), "{line} not in {text}");
    }
}

#[test]
fn a_command_that_cannot_start_says_why_and_where() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let plain = agent.scratch.0.join("plain");
    std::fs::write(&plain, "not executable").unwrap();
    let plain = plain.to_str().unwrap().to_owned();
    let text = agent.scratch.0.join("text");
    std::fs::write(&text, "echo no shell reads this\n").unwrap();
    std::fs::set_permissions(&text, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let text = text.to_str().unwrap().to_owned();
    let cases = [
        (exec("1", &["no-such-command-anywhere"]), Stage::Exec, libc::ENOENT),
        (exec("2", &["/no/such/file"]), Stage::Exec, libc::ENOENT),
        (exec("3", &[&plain]), Stage::Exec, libc::EACCES),
        (exec("4", &[&text]), Stage::Exec, libc::ENOEXEC),
        (exec("5", &["/etc"]), Stage::Exec, libc::EACCES),
        (exec("11", &[&format!("{plain}/below")]), Stage::Exec, libc::ENOTDIR),
        (ExecStart { cwd: b"/no/such/dir".to_vec(), ..exec("6", &["true"]) }, Stage::Cwd, libc::ENOENT),
        (ExecStart { cwd: b"relative".to_vec(), ..exec("7", &["true"]) }, Stage::Cwd, libc::EINVAL),
        (ExecStart { user: b"nobody-of-this-name".to_vec(), ..exec("8", &["true"]) }, Stage::User, libc::ENOENT),
        (ExecStart { argv: vec![], ..exec("9", &["true"]) }, Stage::Request, libc::EINVAL),
        (ExecStart { exec_id: vec![], ..exec("", &["true"]) }, Stage::Request, libc::EINVAL),
        (ExecStart { exec_id: vec![b'x'; 129], ..exec("", &["true"]) }, Stage::Request, libc::EINVAL),
    ];
    for (start, stage, errno) in cases {
        let run = client.run(&start);
        let exited = run.exited();
        assert_eq!((exited.outcome, exited.stage, exited.errno), (Outcome::NotStarted, stage, errno), "{start:?}");
        assert!(run.started.is_none());
    }
    // A file that may not be executed hides behind a later one that may.
    let dir = agent.scratch.0.to_str().unwrap();
    let mut start = exec("10", &["plain"]);
    start.env = vec![format!("PATH=/nowhere:{dir}").into_bytes()];
    assert_eq!(client.run(&start).exited().errno, libc::EACCES);
    // What is wrong with PATH itself says nothing of a program that is nowhere, or behind it.
    let mut start = exec("12", &["true"]);
    start.env = vec![format!("PATH={plain}:/usr/bin:/bin").into_bytes()];
    assert_eq!(client.run(&start).exited().code, 0);
    let mut start = exec("13", &["no-such-command-anywhere"]);
    start.env = vec![format!("PATH=/nowhere:{plain}").into_bytes()];
    assert_eq!(client.run(&start).exited().errno, libc::ENOENT);
    let again = client.run(&exec("1", &["true"]));
    assert_eq!(again.exited().errno, libc::ENOENT, "the same id gives the same answer");
}

#[test]
fn stdin_flows_in_and_its_end_is_seen() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.start(&ExecStart { stdin: true, ..exec("cat", &["cat"]) });
    assert!(client.input(b"cat", 0, b"hello ", DETACH).ok.is_some());
    assert!(client.input(b"cat", u64::MAX, b"world", DETACH).ok.is_some());
    // A retry from an older offset repeats nothing.
    assert!(client.input(b"cat", 6, b"world!", DETACH).ok.is_some());
    assert_eq!(client.input(b"cat", 100, b"x", DETACH).errno(), libc::EINVAL);
    assert!(client.input(b"cat", 12, b"", EOF).ok.is_some());
    let run = client.until(id, Channel::ended);
    assert_eq!((run.stdout().as_str(), run.exited().code), ("hello world!", 0));
    assert!(client.input(b"cat", 0, b"hello ", EOF).ok.is_some(), "what is there already is there");
    assert_eq!(client.input(b"cat", u64::MAX, b"more", EOF).errno(), libc::EPIPE);
    assert_eq!(client.input(b"no-such", 0, b"", EOF).errno(), libc::ENOENT);
}

#[test]
fn without_stdin_a_command_reads_nothing() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let run = client.run(&sh("a", "cat; readlink /proc/self/fd/0"));
    assert_eq!(run.stdout(), "/dev/null\n");
}

#[test]
fn large_stdin_is_throttled_by_the_command_and_arrives_whole() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let bytes = noise(20 << 20, 5);
    let start = ExecStart { stdin: true, ..sh("sum", "sleep 0.2; exec sha256sum") };
    let run = client.start(&start);
    let request = shoal_wire::ExecInput { exec_id: b"sum".to_vec(), offset: 0 };
    let id = client.request(Kind::ExecInput, &request.encode());
    assert!(client.upload(id, &bytes, 100_000).ok.is_some());
    let here = agent.scratch.0.join("bytes");
    std::fs::write(&here, &bytes).unwrap();
    let sum = std::process::Command::new("sha256sum").arg(&here).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap();
    assert_eq!(client.until(run, Channel::ended).stdout()[..64], sum[..64]);
}

#[test]
fn a_process_that_closes_stdin_gives_epipe_and_lives_on() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let gate = Gate::new(&agent);
    let script = format!("exec <&-; echo closed; {}; echo done", gate.wait());
    let id = client.start(&ExecStart { stdin: true, ..sh("a", &script) });
    client.until(id, |channel| channel.stdout() == "closed\n");
    assert_eq!(client.input(b"a", 0, &noise(300_000, 1), EOF).errno(), libc::EPIPE);
    gate.open();
    assert_eq!(client.until(id, Channel::ended).stdout(), "closed\ndone\n");
}

#[test]
fn signals_arrive_and_tell_who_sent_them() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let killed = client.start(&exec("killed", &["sleep", "100"]));
    client.until(killed, |channel| channel.started.is_some());
    assert!(client.signal(b"killed", libc::SIGTERM, false).ok.is_some());
    let exited = client.until(killed, Channel::ended).exited().clone();
    assert_eq!((exited.outcome, exited.signal, exited.code), (Outcome::Killed, libc::SIGTERM, -1));
    let by_itself = client.run(&sh("self", "kill -9 $$")).exited().clone();
    assert_eq!((by_itself.outcome, by_itself.signal), (Outcome::Signaled, libc::SIGKILL));
    let trapped = client.start(&sh("trap", "trap 'exit 3' TERM; echo on; while :; do sleep 0.05; done"));
    client.until(trapped, |channel| !channel.data[0].is_empty());
    client.signal(b"trap", libc::SIGTERM, false);
    let exited = client.until(trapped, Channel::ended).exited();
    assert_eq!((exited.outcome, exited.code), (Outcome::Exited, 3));
    assert_eq!(client.signal(b"trap", libc::SIGTERM, false).errno(), libc::ESRCH);
    assert_eq!(client.signal(b"no-such", libc::SIGTERM, false).errno(), libc::ENOENT);
    let id = client.start(&exec("bad", &["sleep", "100"]));
    assert_eq!(client.signal(b"bad", 0, false).errno(), libc::EINVAL);
    assert_eq!(client.signal(b"bad", 65, true).errno(), libc::EINVAL);
    client.signal(b"bad", libc::SIGKILL, true);
    client.until(id, Channel::ended);
}

#[test]
fn a_signal_reaches_the_command_alone_with_a_terminal_too() {
    let agent = Agent::start();
    let mut client = agent.connect();
    for (name, pty) in [("pipes", false), ("terminal", true)] {
        // The child is in the shell's process group; how it ends tells which signal came first.
        let script = "sleep 1000 & trap 'kill $!; wait $!; echo child $?' USR1; echo on; wait";
        let id = client.start(&ExecStart { pty, ..sh(name, script) });
        client.until(id, |channel| channel.stdout().contains("on"));
        assert!(client.signal(name.as_bytes(), libc::SIGUSR1, false).ok.is_some());
        let channel = client.until(id, Channel::ended);
        assert!(channel.stdout().contains("child 143"), "{name}: {}", channel.stdout());
    }
}

/// A time to sleep for, by which a test knows its own processes.
fn mark(seconds: u32) -> String {
    format!("{seconds}.{:08}", std::process::id())
}

/// Counts live processes whose command line contains `mark`.
fn alive(mark: &str) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        count += usize::from(String::from_utf8_lossy(&line).contains(mark));
    }
    count
}

/// Waits until a script of [`hiders`] has all of its processes.
fn all_hide(seconds: &str) {
    let line = format!("sleep\0{seconds}\0");
    eventually("all five sleep", || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter(|entry| std::fs::read(entry.path().join("cmdline")).is_ok_and(|l| l == line.as_bytes()))
            .count()
            == 5
    });
}

/// A script that hides a process in four ways, and is then a fifth.
fn hiders(seconds: &str) -> String {
    format!(
        "sleep {seconds} & setsid sleep {seconds} & (setsid sleep {seconds} & ) ; \
         (setsid sh -c '(setsid sleep {seconds} &) ; exit' &) ; echo ready; sleep {seconds}"
    )
}

#[test]
fn a_deadline_kills_the_whole_tree_and_keeps_the_output() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let seconds = &mark(4711);
    // A machine that is too busy to get the tree up in one time may have another.
    let ready = [800, 5_000, 25_000].into_iter().any(|timeout_ms| {
        let run = client.run(&ExecStart { timeout_ms, ..sh(&format!("slow{timeout_ms}"), &hiders(seconds)) });
        assert_eq!(run.exited().outcome, Outcome::TimedOut);
        let ready = run.stdout() == "ready\n";
        eventually("all of the tree is gone", || alive(seconds) == 0);
        ready
    });
    assert!(ready, "the output is lost");
}

#[test]
fn a_signal_to_the_tree_finds_those_that_hid() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let seconds = &mark(4712);
    let others = &mark(4713);
    let other = client.start(&exec("other", &["sleep", others]));
    client.until(other, |channel| channel.started.is_some());
    let id = client.start(&sh("tree", &hiders(seconds)));
    all_hide(seconds);
    assert!(client.signal(b"tree", libc::SIGKILL, true).ok.is_some());
    let exited = client.until(id, Channel::ended).exited();
    assert_eq!((exited.outcome, exited.signal), (Outcome::Killed, libc::SIGKILL));
    eventually("all of the tree is gone", || alive(seconds) == 0);
    assert_eq!(alive(others), 1, "another exec's process was hit");
    client.signal(b"other", libc::SIGKILL, true);
    client.until(other, Channel::ended);
}

#[test]
fn what_a_finished_command_left_behind_can_still_be_killed() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let seconds = &mark(4714);
    let run = client.run(&sh("a", &format!("setsid sleep {seconds} > /dev/null 2>&1 & exit 0")));
    assert_eq!(run.exited().outcome, Outcome::Exited);
    eventually("it runs", || alive(seconds) == 1);
    assert!(client.signal(b"a", libc::SIGKILL, true).ok.is_some());
    eventually("it is gone", || alive(seconds) == 0);
    assert_eq!(client.signal(b"a", libc::SIGKILL, true).errno(), libc::ESRCH);
}

#[test]
fn a_child_that_holds_the_pipes_does_not_delay_the_end() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let gate = Gate::new(&agent);
    let mark = agent.scratch.0.join("alive");
    let script = format!("({}; echo late; echo late; touch {}) & echo now; exit 4", gate.wait(), mark.display());
    let run = client.run(&sh("a", &script));
    assert_eq!((run.stdout().as_str(), run.exited().code), ("now\n", 4));
    gate.open();
    eventually("the background process outlives its writes", || mark.exists());
}

#[test]
fn a_background_process_may_write_on_and_costs_little() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.run(&sh("a", "yes & exit 0"));
    // What it writes is thrown away now and then, and not as fast as it comes.
    agent.rests(Duration::from_millis(20));
    client.signal(b"a", libc::SIGKILL, true);
}

#[test]
fn an_exec_id_never_runs_twice() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let file = agent.scratch.0.join("runs");
    let start = sh("once", &format!("echo x >> {}; echo out", file.display()));
    assert_eq!(client.run(&start).stdout(), "out\n");
    let again = client.run(&start);
    assert!(again.started.as_ref().unwrap().existing);
    assert_eq!(again.exited().outcome, Outcome::Exited);
    let mut other = agent.connect();
    let gate = Gate::new(&agent);
    let script = format!("{}; echo x", gate.wait());
    let both = [client.start(&sh("twice", &script)), client.start(&sh("twice", "echo y"))];
    assert_eq!(other.run(&start).exited().code, 0);
    let first = client.until(both[0], Channel::ended);
    assert_eq!(first.errno(), libc::ESTALE, "the newest reader has the output");
    gate.open();
    assert_eq!(client.until(both[1], Channel::ended).stdout(), "x\n");
    assert_eq!(std::fs::read(&file).unwrap(), b"x\n");
}

#[test]
fn output_survives_dropped_connections_byte_for_byte() {
    let agent = Agent::start();
    let bytes = noise(50 << 20, 42);
    let source = agent.scratch.0.join("noise");
    std::fs::write(&source, &bytes).unwrap();
    let script = format!("cat {0} & (head -c 3000000 {0} >&2); wait", source.display());
    let mut got = [Vec::new(), Vec::new()];
    let mut connections = 0;
    let mut lot = 977_u64;
    let exited = loop {
        let mut client = agent.connect();
        // Every second connection tells nothing, every third dies early.
        client.acknowledge = connections % 2 == 0;
        let id = if connections == 0 {
            client.start(&sh("long", &script))
        } else {
            client.attach("long", got[0].len() as u64, got[1].len() as u64)
        };
        connections += 1;
        lot = lot * 31 % 5_000_011;
        client.until(id, |channel| {
            channel.ended() || channel.data[0].len() as u64 > if connections % 2 == 1 { lot } else { WINDOW * 2 / 3 }
        });
        let channel = client.channels.remove(&id).unwrap();
        assert_eq!(channel.base, [got[0].len() as u64, got[1].len() as u64]);
        for (all, new) in got.iter_mut().zip(&channel.data) {
            all.extend_from_slice(new);
        }
        if let Some(End::Exited(exited)) = channel.end {
            break exited;
        }
    };
    assert!(connections > 5, "{connections}");
    assert_eq!((exited.outcome, exited.code), (Outcome::Exited, 0));
    assert!(got[0] == bytes, "stdout differs");
    assert!(got[1] == bytes[..3_000_000], "stderr differs");
}

#[test]
fn a_reader_that_stops_stops_the_producer_and_nothing_else() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.acknowledge = false;
    let id = client.start(&sh("flood", "exec yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"));
    client.until(id, |channel| channel.data[0].len() as u64 == WINDOW);
    agent.rests(Duration::from_millis(200));
    assert!(agent.private_kib() < 4096, "{} KiB", agent.private_kib());
    // Another exec on the same connection goes on.
    assert_eq!(client.run(&exec("b", &["echo", "hi"])).stdout(), "hi\n");
    assert_eq!(client.channels[&id].data[0].len() as u64, WINDOW, "more than the window was sent");
    assert!(client.signal(b"flood", libc::SIGKILL, true).ok.is_some());
    // Only half of it was ever consumed, by whoever comes next.
    let half = WINDOW / 2;
    let next = client.attach("flood", half, 0);
    client.acknowledge = true;
    let channel = client.until(next, Channel::ended);
    assert_eq!(channel.base[0], half);
    assert_eq!(channel.exited().outcome, Outcome::Killed);
}

#[test]
fn a_finished_exec_keeps_its_output_until_it_is_forgotten() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.acknowledge = false;
    client.run(&sh("kept", "echo out; echo err >&2"));
    drop(client);
    let mut client = agent.connect();
    let id = client.attach("kept", 1, 0);
    let channel = client.until(id, Channel::ended);
    assert_eq!((channel.stdout().as_str(), channel.stderr().as_str()), ("ut\n", "err\n"));
    let id = client.attach("kept", 99, 0);
    assert_eq!(client.until(id, Channel::ended).errno(), libc::EINVAL);
    let forget = |id: &[u8]| {
        let mut writer = Writer::default();
        writer.bytes(id);
        writer.into_bytes()
    };
    let running = client.start(&exec("running", &["sleep", "30"]));
    assert_eq!(client.call(Kind::ExecForget, &forget(b"running")).errno(), libc::EBUSY);
    client.signal(b"running", libc::SIGKILL, false);
    client.until(running, Channel::ended);
    assert!(client.call(Kind::ExecForget, &forget(b"kept")).ok.is_some());
    assert_eq!(client.call(Kind::ExecForget, &forget(b"kept")).errno(), libc::ENOENT);
    let id = client.attach("kept", 0, 0);
    assert_eq!(client.until(id, Channel::ended).errno(), libc::ENOENT);
}

#[test]
fn an_end_is_told_to_all_who_wait_and_takes_no_output_from_who_reads() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let gate = Gate::new(&agent);
    let id = |id: &[u8]| {
        let mut writer = Writer::default();
        writer.bytes(id);
        writer.into_bytes()
    };
    let reader = client.start(&sh("a", &format!("echo one; {}; echo two; exit 3", gate.wait())));
    let waits = [0; 3].map(|_| client.request(Kind::ExecWait, &id(b"a")));
    let mut pid = 0;
    for wait in waits {
        pid = client.until(wait, |channel| channel.started.is_some()).started.as_ref().unwrap().pid;
    }
    client.send(Kind::Cancel, 0, waits[0], &[]);
    gate.open();
    for wait in &waits[1..] {
        let exited = client.until(*wait, Channel::ended).exited();
        assert_eq!((exited.outcome, exited.code, exited.pid), (Outcome::Exited, 3, pid));
    }
    assert_eq!(client.until(reader, Channel::ended).stdout(), "one\ntwo\n");
    assert!(!client.channels[&waits[0]].ended(), "told to one who had left");
    let late = client.call(Kind::ExecWait, &id(b"a"));
    assert_eq!((late.exited().code, late.started.is_none(), late.stdout().as_str()), (3, true, ""));
    assert_eq!(client.call(Kind::ExecWait, &id(b"b")).errno(), libc::ENOENT);
    let failed = client.call(Kind::ExecStart, &exec("c", &["/nonexistent"]).encode()).exited().clone();
    assert_eq!(client.call(Kind::ExecWait, &id(b"c")).exited(), &failed);
}

#[test]
fn cancel_leaves_the_exec_running() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let gate = Gate::new(&agent);
    let id = client.start(&sh("a", &format!("echo one; {}; echo two", gate.wait())));
    client.until(id, |channel| channel.started.is_some());
    client.send(Kind::Cancel, 0, id, &[]);
    // What was asked after it is answered after it.
    let list = ExecList::decode(client.call(Kind::ExecList, &[]).ok.as_ref().unwrap()).unwrap();
    assert_eq!(list.execs[0].outcome, Outcome::Running);
    gate.open();
    let again = client.attach("a", 0, 0);
    assert_eq!(client.until(again, Channel::ended).stdout(), "one\ntwo\n");
}

#[test]
fn the_list_tells_all_in_order() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.run(&sh("first", "exit 3"));
    let running = client.start(&exec("second", &["sleep", "30"]));
    client.until(running, |channel| channel.started.is_some());
    client.run(&exec("third", &["/no/such"]));
    let list = ExecList::decode(client.call(Kind::ExecList, &[]).ok.as_ref().unwrap()).unwrap();
    let short: Vec<_> = list.execs.iter().map(|exec| (exec.exec_id.as_slice(), exec.outcome, exec.code)).collect();
    assert_eq!(
        short,
        [
            (b"first" as &[u8], Outcome::Exited, 3),
            (b"second", Outcome::Running, -1),
            (b"third", Outcome::NotStarted, -1)
        ]
    );
    assert_eq!(list.execs[1].argv, [b"sleep".to_vec(), b"30".to_vec()]);
    client.signal(b"second", libc::SIGKILL, true);
}

#[test]
fn a_terminal_is_one_and_hangs_up() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let script = "test -t 0 && test -t 1 && test -t 2 && tty && stty size < /dev/tty; read line; echo got $line; stty size; read end || echo eof";
    let id = client.start(&ExecStart { pty: true, rows: 33, cols: 101, ..sh("pty", script) });
    client.until(id, |channel| channel.stdout().contains("33 101"));
    let resize = ExecResize { exec_id: b"pty".to_vec(), rows: 44, cols: 55 };
    assert!(client.call(Kind::ExecResize, &resize.encode()).ok.is_some());
    assert!(client.input(b"pty", 0, b"hi\n", DETACH).ok.is_some());
    client.until(id, |channel| channel.stdout().contains("44 55"));
    assert!(client.input(b"pty", u64::MAX, b"", EOF).ok.is_some());
    let channel = client.until(id, Channel::ended);
    assert!(channel.stdout().contains("got hi\r\n") && channel.stdout().contains("eof\r\n"), "{}", channel.stdout());
    assert!(channel.stdout().starts_with("/dev/pts/"));
    assert_eq!(channel.exited().code, 0);
    // ^C. One process only: a shell may lose a signal that comes while it forks.
    let id = client.start(&ExecStart { pty: true, ..sh("intr", "echo on; exec sleep 100") });
    client.until(id, |channel| channel.stdout().contains("on"));
    client.input(b"intr", u64::MAX, b"\x03", DETACH);
    let exited = client.until(id, Channel::ended).exited();
    assert_eq!((exited.outcome, exited.signal), (Outcome::Signaled, libc::SIGINT));
    let plain = client.start(&exec("plain", &["sleep", "100"]));
    let resize = ExecResize { exec_id: b"plain".to_vec(), rows: 4, cols: 5 };
    assert_eq!(client.call(Kind::ExecResize, &resize.encode()).errno(), libc::ENOTTY);
    client.signal(b"plain", libc::SIGKILL, true);
    client.until(plain, Channel::ended);
}

#[test]
fn a_terminal_has_a_type_unless_the_environment_names_one() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let script = "printf '<%s>' \"${TERM-none}\"";
    for (id, pty, env, term) in [
        ("none", false, None, "<none>"),
        ("given", true, Some(b"TERM=vt52"), "<vt52>"),
        ("default", true, None, "<xterm-256color>"),
    ] {
        let mut start = ExecStart { pty, ..sh(id, script) };
        start.env.extend(env.map(|variable| variable.to_vec()));
        assert_eq!(client.run(&start).stdout(), term, "{id}");
    }
}

#[test]
fn terminal_output_is_complete() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.start(&ExecStart { pty: true, ..sh("pty", "seq 1 100000") });
    let text = client.until(id, Channel::ended).stdout();
    assert_eq!(text.lines().count(), 100_000);
    assert!(text.ends_with("100000\r\n"));
}

#[test]
fn two_hundred_at_once_all_answer() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let ids: Vec<u32> = (0..200)
        .map(|n| client.start(&sh(&format!("e{n}"), &format!("sleep 0.3; echo {n}; exit {}", n % 100))))
        .collect();
    for (n, id) in ids.iter().enumerate() {
        let channel = client.until(*id, Channel::ended);
        assert_eq!((channel.stdout(), channel.exited().code), (format!("{n}\n"), n as i32 % 100));
    }
    eventually("their descriptors are closed", || agent.open_fds() < 20);
    let list = ExecList::decode(client.call(Kind::ExecList, &[]).ok.as_ref().unwrap()).unwrap();
    assert_eq!(list.execs.len(), 128, "finished execs are bounded");
}

#[test]
fn an_oom_kill_is_told_from_another_kill() {
    let agent_scratch = common::Scratch::new();
    let counter = agent_scratch.0.join("events");
    std::fs::write(&counter, "oom 0\noom_kill 3\n").unwrap();
    let agent = Agent::start_as(Mode::Plain, &[("--oom", &counter)]);
    let mut client = agent.connect();
    let plain = client.run(&sh("a", "kill -9 $$")).exited().clone();
    assert_eq!((plain.outcome, plain.oom_kills), (Outcome::Signaled, 0));
    let bump = |n: u32| format!("echo 'oom_kill {n}' > {}", counter.display());
    let oom = client.run(&sh("b", &format!("{}; kill -9 $$", bump(5)))).exited().clone();
    assert_eq!((oom.outcome, oom.oom_kills, oom.signal), (Outcome::OomKilled, 2, libc::SIGKILL));
    let shell = client.run(&sh("c", &format!("{}; exit 137", bump(6)))).exited().clone();
    assert_eq!((shell.outcome, shell.oom_kills, shell.code), (Outcome::OomKilled, 1, 137));
    let fine = client.run(&sh("d", &format!("{}; exit 0", bump(7)))).exited().clone();
    assert_eq!((fine.outcome, fine.oom_kills), (Outcome::Exited, 1));
}

#[test]
fn a_child_joins_the_cgroup_or_does_not_start() {
    let scratch = common::Scratch::new();
    let procs = scratch.0.join("cgroup.procs");
    std::fs::write(&procs, "").unwrap();
    let agent = Agent::start_as(Mode::Plain, &[("--cgroup", &procs)]);
    assert_eq!(agent.connect().run(&exec("a", &["echo", "hi"])).stdout(), "hi\n");
    assert_eq!(std::fs::read(&procs).unwrap(), b"0");
    let agent = Agent::start_as(Mode::Plain, &[("--cgroup", std::path::Path::new("/dev/full"))]);
    let exited = agent.connect().run(&exec("a", &["true"])).exited().clone();
    assert_eq!((exited.outcome, exited.stage, exited.errno), (Outcome::NotStarted, Stage::Cgroup, libc::ENOSPC));
}

#[test]
fn an_idle_agent_is_small() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let first = agent.private_kib();
    for n in 0..300 {
        client.acknowledge = n < 50;
        let script = if n < 50 { "head -c 3000000 /dev/zero; echo x >&2" } else { "echo out; echo err >&2" };
        client.run(&sh(&format!("e{n}"), script));
    }
    assert!(first <= 300, "{first} KiB at first");
    eventually("memory goes back", || agent.private_kib() <= 300);
    println!("private memory: {first} KiB at first, {} KiB after use", agent.private_kib());
}

#[test]
fn pid_1_reaps_every_orphan() {
    if !is_root() {
        return;
    }
    let agent = Agent::start_as(Mode::Init, &[]);
    let mut client = agent.connect();
    let orphans = "for i in $(seq 1 300); do (setsid sh -c '(sleep 0.0$(($$ % 7)) &) ; exit 3' &) ; done; sleep 0.5";
    client.run(&sh("orphans", orphans));
    let count = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l";
    let mut round = 0;
    eventually("no zombie is left", || {
        round += 1;
        client.run(&sh(&format!("count{round}"), count)).stdout().trim() == "0"
    });
    assert!(client.run(&sh("own", "cat /proc/1/comm")).stdout().starts_with("shoal-agent"));
}

#[test]
fn a_fork_bomb_is_killed_with_its_tree() {
    if !is_root() {
        return;
    }
    let agent = Agent::start_as(Mode::Init, &[]);
    let mut client = agent.connect();
    let bomb = "ulimit -u 100000; b() { [ $(ls -d /proc/[0-9]* | wc -l) -gt 150 ] && exec sleep 60; b & b & wait; }; b";
    let id = client.start(&ExecStart { timeout_ms: 700, ..sh("bomb", bomb) });
    assert_eq!(client.until(id, Channel::ended).exited().outcome, Outcome::TimedOut);
    let mut round = 0;
    eventually("only the agent and the counter are left", || {
        round += 1;
        let count = client.run(&sh(&format!("n{round}"), "echo $(ls -d /proc/[0-9]* | wc -l)")).stdout();
        count.trim().parse::<u32>().unwrap() <= 5
    });
}

#[test]
fn pr_04_root_keeps_eleven_capabilities_and_others_none() {
    if !is_root() {
        return;
    }
    let agent = Agent::start_as(Mode::Guest, &[]);
    let mut client = agent.connect();
    let status = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs)' /proc/self/status";
    let root = client.run(&sh("root", status)).stdout();
    for line in [
        "Uid:\t0\t0\t0\t0",
        "Gid:\t0\t0\t0\t0",
        "CapInh:\t0000000000000000",
        "CapPrm:\t00000000800405fb",
        "CapEff:\t00000000800405fb",
        "CapBnd:\t00000000800405fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(root.contains(line), "{line} not in {root}");
    }
    let user = client.run(&ExecStart { user: b"1234:5678".to_vec(), ..sh("user", status) }).stdout();
    for line in [
        "Uid:\t1234\t1234\t1234\t1234",
        "Gid:\t5678\t5678\t5678\t5678",
        "Groups:\t \n",
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapAmb:\t0000000000000000",
    ] {
        assert!(user.contains(line), "{line} not in {user}");
    }
    for id in ["65536", "0:65536", "4294967295"] {
        let start = ExecStart { user: id.into(), ..sh(&format!("bad{id}").replace(':', "-"), "true") };
        assert_eq!(client.run(&start).exited().stage, Stage::User, "{id}");
    }
    // The image's own nobody, with the terminal its own.
    let start = ExecStart {
        user: b"nobody".to_vec(),
        pty: true,
        ..sh("pty", "stat -c %U $(tty); echo > /dev/tty && echo ok; id -u")
    };
    let text = client.run(&start).stdout();
    assert!(text.starts_with("nobody\r\n") && text.contains("ok"), "{text}");
}

#[test]
fn pr_02_nobody_looks_into_the_agent() {
    if !is_root() {
        return;
    }
    let agent = Agent::start_as(Mode::Guest, &[]);
    let mut client = agent.connect();
    let script = "cat /proc/1/environ; cat /proc/1/maps; cat /proc/1/mem | head -c 1; cat /proc/1/fd/0; \
        cat /proc/1/root/etc/passwd; readlink /proc/1/exe /proc/1/cwd /proc/1/root /proc/1/fd/*; true";
    for user in ["0", "1000"] {
        let run = client.run(&ExecStart { user: user.into(), ..sh(user, script) });
        assert_eq!(run.stdout(), "", "as {user}");
        assert!(run.stderr().matches("ermission denied").count() >= 4, "{}", run.stderr());
    }
    client.run(&sh("kill", "kill -9 1; kill -STOP 1"));
    assert_eq!(client.run(&exec("alive", &["echo", "yes"])).stdout(), "yes\n");
}

#[test]
fn a_missing_working_directory_is_made_for_its_user() {
    if !is_root() {
        return;
    }
    let agent = Agent::start_as(Mode::Guest, &[]);
    let mut client = agent.connect();
    let cwd = agent.scratch.path("made/for/user");
    let start =
        ExecStart { cwd, make_cwd: true, user: b"4321:4321".to_vec(), ..sh("a", "pwd; touch here && stat -c %u:%g .") };
    // The scratch directory itself is entered by anybody.
    let run = client.run(&start);
    assert!(run.stdout().ends_with("made/for/user\n4321:4321\n"), "{} {}", run.stdout(), run.stderr());
}

#[test]
fn malformed_frames_end_their_connection_only() {
    let agent = Agent::start();
    let mut good = agent.connect();
    let bad: [&[u8]; 7] = [
        &[0xff; 64],
        &[0, 0, 0, 0, 1, 0, 0, 0, 0x40, 0, 0, 0],
        &[0, 0, 0, 0, 1, 0, 0, 0, 0x10, 0, 0, 0],
        &[0, 0, 0, 0, 0, 0, 0, 0, 0x17, 0, 0, 0],
        &[1, 0, 0, 0, 1, 0, 0, 0, 0x17, 0, 0, 0, 9],
        &[0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0, 0x17, 0, 0, 0],
        &[0, 0, 0, 0, 1, 0, 0, 0, 0x17, 0, 1, 0],
    ];
    for bytes in bad {
        let mut client = agent.connect();
        std::io::Write::write_all(&mut client.stream, bytes).unwrap();
        while client.take() {}
    }
    // A window beyond what was sent, and a second request on a channel that is busy.
    let mut client = agent.connect();
    let id = client.start(&exec("w", &["sleep", "100"]));
    client.send(Kind::Window, 0, id, &shoal_wire::Window { consumed: 5 }.encode());
    while client.take() {}
    let mut client = agent.connect();
    let id = client.start(&exec("w2", &["sleep", "100"]));
    client.send(Kind::ExecList, 0, id, &[]);
    while client.take() {}
    assert_eq!(good.run(&exec("still", &["echo", "here"])).stdout(), "here\n");
    for id in [b"w".as_slice(), b"w2"] {
        assert!(good.signal(id, libc::SIGKILL, true).ok.is_some(), "a broken connection took its command along");
    }
    // Random bytes, for what nobody thought of.
    for seed in 1..200 {
        let mut client = agent.connect();
        let mut bytes = noise(400, seed);
        for (n, byte) in bytes.iter_mut().enumerate() {
            // Often enough a plausible header.
            if n % 12 >= 10 || (n % 12 < 4 && n % 12 > 0) {
                *byte = 0;
            }
        }
        let _ = std::io::Write::write_all(&mut client.stream, &bytes);
        drop(client);
    }
    assert_eq!(good.run(&exec("still2", &["echo", "here"])).stdout(), "here\n");
}

#[test]
fn a_client_that_asks_and_never_reads_is_not_heard_for_long() {
    let agent = Agent::start();
    let mut rude = agent.connect();
    for n in 0..100 {
        rude.run(&exec(&format!("e{n}"), &["true", &"x".repeat(1000)]));
    }
    rude.stream.set_nonblocking(true).unwrap();
    // Whole frames as long as the socket takes them: each asks for an answer of a hundred kilobytes.
    let mut refused = 0;
    for n in 1_000.. {
        let request = shoal_wire::frame(Kind::ExecList, 0, n, &[]);
        match std::io::Write::write(&mut rude.stream, &request) {
            Ok(_) => refused = 0,
            Err(_) if refused < 50 => {
                refused += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(_) => break,
        }
    }
    assert!(agent.private_kib() < 6 << 10, "{} KiB", agent.private_kib());
    assert_eq!(agent.connect().run(&exec("other", &["echo", "hi"])).stdout(), "hi\n");
}

#[test]
fn a_detached_command_never_waits_while_nobody_reads() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let gate = Gate::new(&agent);
    let script = format!("seq 1 400000; touch {0}/done; {1}; echo last", agent.scratch.0.display(), gate.wait());
    let id = client.start(&ExecStart { detached: true, ..sh("a", &script) });
    client.until(id, |channel| channel.started.is_some());
    client.send(Kind::Cancel, 0, id, &[]);
    // More than pipe and ring hold.
    eventually("the command has written it all", || agent.scratch.0.join("done").exists());
    let id = client.attach("a", 0, 0);
    let from = client.until(id, |channel| channel.started.is_some()).base[0];
    assert!(from > WINDOW, "{from}");
    gate.open();
    let mut all: Vec<String> = (1..=400_000).map(|number| number.to_string()).collect();
    all.push("last\n".to_owned());
    let all = all.join("\n");
    let channel = client.until(id, Channel::ended);
    // What is there is the latest, without a gap.
    assert!(channel.data[0].len() > 64 << 10, "{}", channel.data[0].len());
    assert_eq!(channel.stdout(), all[from as usize..]);
}

#[test]
fn a_detached_command_waits_for_its_reader_until_the_reader_leaves() {
    let agent = Agent::start();
    let mut reader = agent.connect();
    reader.acknowledge = false;
    let id = reader.start(&ExecStart { detached: true, ..sh("a", "yes | head -c 8000000; echo end") });
    reader.until(id, |channel| channel.data[0].len() as u64 == WINDOW);
    let mut other = agent.connect();
    // The same start once more, as after a broken connection: it takes the output away from nobody.
    let again = other.start(&ExecStart { detached: true, ..sh("a", "echo again") });
    assert!(other.until(again, |channel| channel.started.is_some() || channel.ended()).started.is_some());
    let running = |client: &mut common::Client| {
        let list = client.call(Kind::ExecList, &[]).ok.clone().unwrap();
        ExecList::decode(&list).unwrap().execs[0].outcome == Outcome::Running
    };
    agent.rests(Duration::from_millis(200));
    assert!(running(&mut other), "it did not wait");
    assert!(!reader.channels[&id].ended());
    drop(reader);
    eventually("the command goes on", || !running(&mut other));
    let id = other.attach("a", 0, 0);
    let channel = other.until(id, Channel::ended);
    assert!(channel.base[0] > WINDOW && channel.stdout().ends_with("end\n"));
    assert_eq!(channel.base[0] + channel.data[0].len() as u64, 8_000_004);
}
