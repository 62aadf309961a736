//! The node daemon: one binary, two processes.
//!
//! The *keeper* has privileges and reads a closed list of operations; the *front door* has none and
//! reads what strangers send.

mod front_door;
mod keeper;

use std::process::ExitCode;

const USAGE: &str = "usage: shoal-noded serve --data-dir DIR --run-dir DIR --agent FILE --python FILE --pool FILE \
    [--ready-fd N] [--idle-exit SECONDS] [--listen ADDRESS:PORT]\n\nStarted by `shoal serve`, which prepares the directories and the pool.";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() != Some("serve") {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    match options(words) {
        Ok(options) => keeper::serve(&options),
        Err(error) => {
            eprintln!("shoal-noded: {error}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn options(mut words: impl Iterator<Item = String>) -> Result<keeper::Options, String> {
    let mut given = std::collections::HashMap::new();
    while let Some(word) = words.next() {
        let known = ["data-dir", "run-dir", "agent", "python", "pool", "ready-fd", "idle-exit", "listen"];
        let name =
            word.strip_prefix("--").filter(|name| known.contains(name)).ok_or(format!("unknown option {word}"))?;
        given.insert(name.to_owned(), words.next().ok_or(format!("{word} needs a value"))?);
    }
    let ready =
        given.remove("ready-fd").map(|text| text.parse().map_err(|_| "--ready-fd is not a number")).transpose()?;
    let idle_exit = given.remove("idle-exit");
    let listen = given.remove("listen");
    let mut need = |name: &str| given.remove(name).ok_or(format!("--{name} is missing"));
    Ok(keeper::Options {
        data_dir: need("data-dir")?,
        run_dir: need("run-dir")?,
        agent: need("agent")?,
        python: need("python")?,
        pool: need("pool")?,
        ready,
        idle_exit,
        listen,
    })
}
