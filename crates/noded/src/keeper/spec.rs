//! The keeper's closed list of operations, in the words of the OCI runtime-spec where it has one.

use serde::Deserialize;

use super::error::{Error, Result};

/// One packet from the server.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// Chosen by the server, repeated in the answer.
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub operation: Operation,
}

/// Everything that the keeper does.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Operation {
    /// Tells versions and walls.
    Hello,
    /// Brings a sandbox's PID 1 up to its exec.
    Create {
        /// Its id.
        sandbox: String,
        /// Told to the guest agent, and by it in READY.
        generation: u64,
        /// What it is.
        spec: Box<Spec>,
    },
    /// Ends a sandbox and frees all it held; an unknown one is no error.
    Destroy {
        /// Its id.
        sandbox: String,
    },
    /// Takes a block of host id ranges that no other node on this machine has.
    ClaimIds,
    /// Lists the sandboxes that are up, a page at a time, by id; and with the last page what ended by itself lately.
    List {
        /// Last id of the page before.
        #[serde(default)]
        after: String,
    },
    /// Unpacks the layer behind the descriptor that came along.
    LayerUnpack(LayerUnpack),
    /// Gives an unpacked layer its final name.
    LayerCommit {
        /// Name given at unpacking.
        layer: String,
        /// What it turned out to be.
        diff_id: String,
    },
    /// Drops an unpacked layer that shall not be.
    LayerDiscard {
        /// Name given at unpacking.
        layer: String,
    },
    /// Removes a layer that no image uses.
    LayerRemove {
        /// Its diffID.
        diff_id: String,
    },
    /// Lists the layers.
    LayerList,
}

/// See [`Operation::LayerUnpack`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerUnpack {
    /// Name until it is committed.
    pub layer: String,
    /// Bytes that it may take at the most.
    pub max_bytes: u64,
    /// Members that it may have at the most.
    pub max_entries: u64,
    /// Bytes of the blob, from the descriptor's position; absent: to its end.
    pub length: Option<u64>,
    /// Milliseconds it may take.
    pub deadline_ms: u64,
}

/// A sandbox. Source: OCI runtime-spec, config.md and config-linux.md; `disk` and `shm` are ours.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Spec {
    /// Hostname inside.
    pub hostname: String,
    /// What holds for every process.
    pub process: Process,
    /// The file system.
    pub root: Root,
    /// Namespaces' maps and limits.
    pub linux: Linux,
    /// Hard limit of what is written to the root file system.
    pub disk: Limit,
    /// Size of /dev/shm.
    pub shm: Limit,
}

/// Source: OCI runtime-spec, `process`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Process {
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// For the OOM killer; more is killed sooner.
    pub oom_score_adj: i32,
}

/// Source: OCI runtime-spec, `process.rlimits`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// `RLIMIT_…`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// The layers under the root file system.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// diffIDs in hex, topmost first.
    pub layers: Vec<String>,
}

/// Source: OCI runtime-spec, `linux`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Linux {
    /// User ids.
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids.
    pub gid_mappings: Vec<IdMapping>,
    /// Limits.
    pub resources: Resources,
    /// Name of the seccomp policy.
    pub seccomp: String,
}

/// Source: OCI runtime-spec, `linux.uidMappings`.
#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct IdMapping {
    /// First id inside.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// First id on the host.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

/// Source: OCI runtime-spec, `linux.resources`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// Memory.
    pub memory: Limit,
    /// Tasks.
    pub pids: Limit,
    /// CPU time.
    pub cpu: Cpu,
}

/// One number.
#[derive(Debug, Deserialize, Clone, Copy)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Bytes, or tasks.
    pub limit: u64,
}

/// Source: OCI runtime-spec, `linux.resources.cpu`.
#[derive(Debug, Deserialize, Clone, Copy)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Microseconds of CPU time in a period.
    pub quota: u64,
    /// Microseconds.
    pub period: u64,
    /// Weight when CPUs are short; 1024 is one CPU's worth.
    pub shares: u64,
}

/// Ids that one sandbox gets: 0 to 65535 are the image's, 65536 is the guest agent's.
pub const IDS_PER_SANDBOX: u32 = 65_537;
/// The guest agent's id inside.
pub const AGENT_ID: u32 = 65_536;
/// First host id that sandboxes get. The upper half of the id space is in no distribution's range.
pub const FIRST_ID: u32 = 0x8000_0000;
/// Host ids of the layer unpacker; below all sandboxes and above all that systemd hands out.
pub const UNPACK_ID: u32 = 0x7ffe_0000;
/// Host id of the front door.
pub const DOOR_ID: u32 = 0x7ffd_0000;

impl Spec {
    /// Checks everything that the keeper relies on.
    pub fn check(&self) -> Result<()> {
        let [map] = self.linux.uid_mappings.as_slice() else {
            return Err(Error::invalid("uidMappings must have one entry"));
        };
        if self.linux.gid_mappings != self.linux.uid_mappings {
            return Err(Error::invalid("gidMappings must equal uidMappings"));
        }
        let offset = map.host_id.checked_sub(FIRST_ID);
        if map.container_id != 0
            || map.size != IDS_PER_SANDBOX
            || offset.is_none_or(|offset| offset % IDS_PER_SANDBOX != 0)
            || map.host_id.checked_add(IDS_PER_SANDBOX).is_none()
        {
            return Err(Error::invalid(format!(
                "uidMappings must map 0 to {FIRST_ID} + n * {IDS_PER_SANDBOX}, {IDS_PER_SANDBOX} ids"
            )));
        }
        if self.root.layers.is_empty() || self.root.layers.len() > 500 {
            return Err(Error::invalid("root.layers must have 1 to 500 entries"));
        }
        for layer in &self.root.layers {
            check_diff_id(layer)?;
        }
        let hostname_ok = (1..=63).contains(&self.hostname.len())
            && self.hostname.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !hostname_ok {
            return Err(Error::invalid("hostname must be 1 to 63 letters, digits and dashes"));
        }
        let resources = &self.linux.resources;
        if resources.memory.limit < (4 << 20) || resources.pids.limit == 0 || self.disk.limit < (1 << 20) {
            return Err(Error::invalid("limits must be at least 4 MiB of memory, 1 task and 1 MiB of disk"));
        }
        if resources.cpu.quota < 1_000 || !(1_000..=1_000_000).contains(&resources.cpu.period) {
            return Err(Error::invalid("cpu.quota must be at least 1000 and cpu.period 1000 to 1000000"));
        }
        if self.linux.seccomp != "standard" {
            return Err(Error::invalid("the only seccomp policy is `standard`"));
        }
        if !(0..=1000).contains(&self.process.oom_score_adj) {
            return Err(Error::invalid("oomScoreAdj must be 0 to 1000"));
        }
        for limit in &self.process.rlimits {
            if rlimit_number(&limit.kind).is_none() || limit.soft > limit.hard {
                return Err(Error::invalid(format!(
                    "rlimit {} is unknown or its soft limit is over the hard one",
                    limit.kind
                )));
            }
        }
        Ok(())
    }

    /// First host id of the sandbox.
    pub fn host_id(&self) -> u32 {
        self.linux.uid_mappings.first().map_or(0, |map| map.host_id)
    }
}

/// The number behind `RLIMIT_…`.
pub fn rlimit_number(name: &str) -> Option<u32> {
    Some(match name {
        "RLIMIT_AS" => libc::RLIMIT_AS,
        "RLIMIT_CORE" => libc::RLIMIT_CORE,
        "RLIMIT_CPU" => libc::RLIMIT_CPU,
        "RLIMIT_DATA" => libc::RLIMIT_DATA,
        "RLIMIT_FSIZE" => libc::RLIMIT_FSIZE,
        "RLIMIT_LOCKS" => libc::RLIMIT_LOCKS,
        "RLIMIT_MEMLOCK" => libc::RLIMIT_MEMLOCK,
        "RLIMIT_MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
        "RLIMIT_NICE" => libc::RLIMIT_NICE,
        "RLIMIT_NOFILE" => libc::RLIMIT_NOFILE,
        "RLIMIT_NPROC" => libc::RLIMIT_NPROC,
        "RLIMIT_RTPRIO" => libc::RLIMIT_RTPRIO,
        "RLIMIT_RTTIME" => libc::RLIMIT_RTTIME,
        "RLIMIT_SIGPENDING" => libc::RLIMIT_SIGPENDING,
        "RLIMIT_STACK" => libc::RLIMIT_STACK,
        _ => return None,
    })
}

/// Checks that a sandbox id is one path component of ours.
pub fn check_sandbox_id(id: &str) -> Result<()> {
    let rest = id.strip_prefix("sb-").unwrap_or("");
    if (8..=64).contains(&rest.len()) && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
        return Ok(());
    }
    Err(Error::invalid("a sandbox id is `sb-` and 8 to 64 lower-case letters and digits"))
}

/// Checks that a diffID is 64 hex digits.
pub fn check_diff_id(id: &str) -> Result<()> {
    if id.len() == 64 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return Ok(());
    }
    Err(Error::invalid("a diffID is 64 lower-case hex digits"))
}

/// Checks a layer's name before it is committed.
pub fn check_layer_name(name: &str) -> Result<()> {
    if (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
    {
        return Ok(());
    }
    Err(Error::invalid("a layer's name is 1 to 64 lower-case letters, digits and dashes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn good() -> Value {
        let map = json!([{ "containerID": 0, "hostID": FIRST_ID + 3 * IDS_PER_SANDBOX, "size": IDS_PER_SANDBOX }]);
        json!({
            "hostname": "sb", "process": { "rlimits": [{ "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }], "oomScoreAdj": 100 },
            "root": { "layers": ["0".repeat(64)] },
            "linux": {
                "uidMappings": map, "gidMappings": map, "seccomp": "standard",
                "resources": { "memory": { "limit": 1 << 29 }, "pids": { "limit": 64 },
                    "cpu": { "quota": 50_000, "period": 100_000, "shares": 512 } },
            },
            "disk": { "limit": 1 << 30 }, "shm": { "limit": 1 << 26 },
        })
    }

    fn check(change: impl Fn(&mut Value)) -> Result<()> {
        let mut spec = good();
        change(&mut spec);
        serde_json::from_value::<Spec>(spec).map_err(|error| Error::invalid(error.to_string()))?.check()
    }

    #[test]
    fn a_whole_spec_passes() {
        check(|_| {}).unwrap();
    }

    #[test]
    fn ids_of_the_host_or_of_a_neighbour_are_refused() {
        for host_id in [0, 1000, FIRST_ID - 1, FIRST_ID + 1, FIRST_ID + IDS_PER_SANDBOX - 1, u32::MAX - 5] {
            for map in ["uidMappings", "gidMappings"] {
                assert!(check(|spec| spec["linux"][map][0]["hostID"] = json!(host_id)).is_err(), "{map} {host_id}");
            }
        }
        assert!(check(|spec| spec["linux"]["uidMappings"][0]["size"] = json!(IDS_PER_SANDBOX + 1)).is_err());
        assert!(check(|spec| spec["linux"]["uidMappings"] = json!([])).is_err());
    }

    #[test]
    fn a_layer_is_named_by_its_digest_and_by_nothing_that_could_be_a_path() {
        for layer in ["", "../x", ".new-a", "A", &"a".repeat(63), &format!("{}/", "a".repeat(63)), &"g".repeat(64)] {
            assert!(check(|spec| spec["root"]["layers"] = json!([layer])).is_err(), "{layer}");
        }
        assert!(check(|spec| spec["root"]["layers"] = json!([])).is_err());
    }

    #[test]
    fn a_limit_is_never_absent_or_nothing() {
        for (pointer, value) in [
            ("/linux/resources/memory/limit", json!(0)),
            ("/linux/resources/pids/limit", json!(0)),
            ("/linux/resources/cpu/quota", json!(0)),
            ("/disk/limit", json!(0)),
            ("/process/oomScoreAdj", json!(-1)),
            ("/linux/seccomp", json!("unconfined")),
        ] {
            assert!(check(|spec| *spec.pointer_mut(pointer).unwrap() = value.clone()).is_err(), "{pointer}");
        }
        assert!(
            check(|spec| spec["linux"]["resources"].as_object_mut().unwrap().remove("memory").map_or((), drop))
                .is_err()
        );
    }

    #[test]
    fn what_the_keeper_does_not_know_it_does_not_do() {
        assert!(check(|spec| spec["linux"]["devices"] = json!([])).is_err());
        assert!(serde_json::from_value::<Request>(json!({ "id": 1, "op": "exec" })).is_err());
    }

    #[test]
    fn a_sandbox_id_is_one_path_component() {
        check_sandbox_id("sb-abcdefgh2345").unwrap();
        for id in ["", "sb-", "sb-short", "sb-abc/defghi", "sb-../../../etc", "SB-abcdefgh2345", "sb-abcdefgh2345.sock"]
        {
            assert!(check_sandbox_id(id).is_err(), "{id}");
        }
    }
}
