//! The walls, by their ids: what the policy must say whatever its author meant.

use super::super::policy::{Action, Policy};
use super::{ARCHES, Arch, judge, numbers, standard_policy};

/// Expects that `name` fails with `errno` on every architecture that has it, with and without rubbish in the
/// high halves of its arguments where the kernel ignores them.
struct Wall {
    policy: Policy,
}

impl Wall {
    fn new() -> Self {
        Self { policy: standard_policy() }
    }

    fn answer(&self, arch: Arch, name: &str, arguments: &[u64]) -> Option<Action> {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        let number = *numbers(arch).get(name)?;
        Some(judge(&self.policy, arch, number, all))
    }

    #[track_caller]
    fn expect(&self, name: &str, arguments: &[u64], expected: Action) {
        let mut seen = 0;
        for arch in ARCHES {
            if let Some(found) = self.answer(arch, name, arguments) {
                assert_eq!(found, expected, "{arch:?} {name} {arguments:x?}");
                seen += 1;
            }
        }
        assert!(seen > 0, "{name} is unknown");
    }

    #[track_caller]
    fn denies(&self, names: &str, arguments: &[u64], errno: i32) {
        for name in names.split_whitespace() {
            self.expect(name, arguments, Action::Errno(errno as u16));
        }
    }

    #[track_caller]
    fn allows(&self, names: &str, arguments: &[u64]) {
        for name in names.split_whitespace() {
            self.expect(name, arguments, Action::Allow);
        }
    }
}

/// As a register holds it when the caller left rubbish in its high half.
const RUBBISH: u64 = 0xdead_beef_0000_0000;

#[test]
fn ks_01_io_uring_does_not_exist() {
    Wall::new().denies("io_uring_setup io_uring_enter io_uring_register", &[], libc::ENOSYS);
}

#[test]
fn ks_02_insights_into_the_kernel_are_refused() {
    Wall::new().denies("bpf perf_event_open userfaultfd", &[], libc::EPERM);
}

#[test]
fn ks_03_no_namespace_can_be_made_or_joined() {
    let wall = Wall::new();
    let namespaces = [0x80, 0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
    let thread = 0x3d_0f00;
    for flag in namespaces {
        for other in [0, libc::SIGCHLD as u64, thread, RUBBISH, !flag] {
            wall.denies("clone unshare", &[flag | other], libc::EPERM);
        }
    }
    wall.denies("setns", &[3, 0], libc::EPERM);
    wall.denies("clone3", &[], libc::ENOSYS);
    wall.allows("clone", &[libc::SIGCHLD as u64]);
    wall.allows("clone", &[thread]);
    wall.allows("clone", &[0x4111]); // posix_spawn
    wall.allows("unshare", &[0x600]);
    wall.denies("unshare", &[0x600 | 1 << 40], libc::EPERM);
}

#[test]
fn ks_04_fs_10_nothing_can_be_mounted() {
    let wall = Wall::new();
    wall.denies("mount umount2 pivot_root", &[], libc::EPERM);
    wall.denies("fsopen fspick fsmount fsconfig open_tree move_mount mount_setattr open_tree_attr", &[], libc::ENOSYS);
}

#[test]
fn ks_05_keyrings_do_not_exist() {
    Wall::new().denies("add_key keyctl request_key", &[], libc::ENOSYS);
}

#[test]
fn ks_06_ks_16_the_machine_is_out_of_reach() {
    let wall = Wall::new();
    wall.denies("init_module finit_module delete_module kexec_load kexec_file_load reboot", &[], libc::EPERM);
    wall.denies("swapon swapoff acct ioperm iopl open_by_handle_at syslog quotactl sethostname", &[], libc::EPERM);
}

#[test]
fn ks_07_no_clock_can_be_set() {
    Wall::new().denies("clock_settime settimeofday adjtimex clock_adjtime", &[], libc::EPERM);
}

#[test]
fn ks_09_four_socket_families_exist() {
    let wall = Wall::new();
    for family in 0..64_u64 {
        for kind in [1, 1 | 0x80000, 2 | 0x800] {
            if ![1, 2, 10, 16].contains(&family) {
                wall.denies("socket socketpair", &[family, kind, 0], libc::EAFNOSUPPORT);
                wall.denies("socket socketpair", &[family | RUBBISH, kind, 0], libc::EAFNOSUPPORT);
            } else if family != 16 {
                wall.allows("socket", &[family, kind, 0]);
                wall.allows("socket", &[family | RUBBISH, kind | RUBBISH, RUBBISH]);
            }
        }
    }
    wall.allows("socketpair", &[1, 1 | 0x80000, 0]);
    wall.allows("socketpair", &[1, 5, 0]);
    for family in [2, 10, 16] {
        wall.denies("socketpair", &[family, 1, 0], libc::EOPNOTSUPP);
    }
}

#[test]
fn ks_10_netlink_is_route_only() {
    let wall = Wall::new();
    for protocol in 0..40 {
        for kind in [libc::SOCK_RAW, libc::SOCK_DGRAM, libc::SOCK_RAW | libc::SOCK_CLOEXEC] {
            for rubbish in [0, RUBBISH] {
                let arguments = [16 | rubbish, kind as u64 | rubbish, protocol | rubbish];
                if protocol == 0 {
                    wall.allows("socket", &arguments);
                } else {
                    wall.denies("socket", &arguments, libc::EPROTONOSUPPORT);
                }
            }
        }
    }
}

#[test]
fn ks_11_no_raw_and_no_packet_socket() {
    let wall = Wall::new();
    for family in [1, 2, 10] {
        for kind in [libc::SOCK_RAW, 10] {
            for flags in [0, libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK] {
                for protocol in [0, 1, 6, 17, 255, 768] {
                    for rubbish in [0, RUBBISH] {
                        let arguments = [family | rubbish, (kind | flags) as u64 | rubbish, protocol];
                        wall.denies("socket", &arguments, libc::EPERM);
                    }
                }
            }
        }
    }
}

#[test]
fn ks_12_only_tcp_udp_and_ping_and_no_upper_layers() {
    let wall = Wall::new();
    for family in [2, 10] {
        for kind in [1_u64, 2] {
            for protocol in 0..300_u64 {
                let fits = matches!((kind, protocol), (1, 0 | 6) | (2, 0 | 1 | 17 | 58));
                for rubbish in [0, RUBBISH] {
                    let arguments = [family, kind, protocol | rubbish];
                    if fits {
                        wall.allows("socket", &arguments);
                    } else {
                        wall.denies("socket", &arguments, libc::EPROTONOSUPPORT);
                    }
                }
            }
        }
        for kind in [0, 4, 5, 6, 7, 15] {
            wall.denies("socket", &[family, kind, 0], libc::ESOCKTNOSUPPORT);
        }
    }
    for (level, option) in [(6, 31), (17, 100), (0, 16), (0, 17), (41, 34), (41, 35), (0, 64), (41, 64)] {
        for rubbish in [0, RUBBISH] {
            wall.denies("setsockopt", &[3, level | rubbish, option | rubbish], libc::ENOPROTOOPT);
        }
    }
    for level in [2, 132, 136, 255, 263, 272, 273, 279, 282, 283, 284, 286, u64::from(u32::MAX)] {
        wall.denies("setsockopt", &[3, level, 1], libc::ENOPROTOOPT);
    }
    // TCP_NODELAY, TCP_FASTOPEN, SO_REUSEPORT, IP_TOS, IPV6_V6ONLY, UDP_SEGMENT, IP_ADD_MEMBERSHIP.
    for (level, option) in [(6, 1), (6, 23), (1, 15), (0, 1), (41, 26), (17, 103), (0, 35)] {
        wall.allows("setsockopt", &[3, level, option]);
    }
}

#[test]
fn ks_13_no_requeue_to_pi_futexes() {
    let wall = Wall::new();
    for modifiers in [0, 0x80, 0x100, 0x180, RUBBISH] {
        for operation in [2, 11, 12, 14, 15, 0x200, 0x40b, 1 << 31] {
            wall.denies("futex", &[0, operation | modifiers], libc::ENOSYS);
        }
        for operation in [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 13] {
            wall.allows("futex", &[0, operation | modifiers]);
        }
    }
    wall.denies("futex_requeue", &[], libc::ENOSYS);
    wall.allows("futex_waitv futex_wait futex_wake", &[]);
}

#[test]
fn ks_18_no_personality_weakens_memory() {
    let wall = Wall::new();
    for bit in 0..32 {
        let persona = 1_u64 << bit;
        for rubbish in [0, RUBBISH] {
            if [0x8, 0x2_0000, 0x4_0000].contains(&persona) {
                wall.allows("personality", &[persona | rubbish]);
            } else {
                wall.denies("personality", &[persona | rubbish], libc::EPERM);
                wall.denies("personality", &[persona | 0x4_0008 | rubbish], libc::EPERM);
            }
        }
    }
    wall.allows("personality", &[0]);
    wall.allows("personality", &[0xffff_ffff]);
    wall.allows("personality", &[u64::MAX]);
}

#[test]
fn fs_08_no_device_node_can_be_made() {
    let wall = Wall::new();
    for permissions in [0, 0o666, 0o7777] {
        for rubbish in [0, RUBBISH] {
            for device in [0_u64, 0x103, 0x801] {
                let (character, block) = (0x2000 | permissions | rubbish, 0x6000 | permissions | rubbish);
                wall.denies("mknod", &[0, block, device], libc::EPERM);
                wall.denies("mknodat", &[0, 0, block, device], libc::EPERM);
                if device == 0 {
                    wall.allows("mknod", &[0, character, device | rubbish]);
                    wall.allows("mknodat", &[0, 0, character, device | rubbish]);
                } else {
                    wall.denies("mknod", &[0, character, device], libc::EPERM);
                    wall.denies("mknodat", &[0, 0, character, device], libc::EPERM);
                }
                for harmless in [0, 0x1000, 0x8000, 0xc000] {
                    wall.allows("mknodat", &[0, 0, harmless | permissions | rubbish, device]);
                }
            }
        }
    }
}

#[test]
fn pr_02_nobody_takes_anothers_descriptors() {
    Wall::new().denies("pidfd_getfd", &[], libc::EPERM);
}

#[test]
fn pr_08_no_terminal_is_typed_into_whatever_the_high_bits() {
    let wall = Wall::new();
    for request in [0x5412, 0x541c, 0x541d, 0x5423, 0x8940, 0x8941, 0x8982, 0x8983, 0x89a0, 0x89a1, 0x89a2, 0x89a3] {
        wall.denies("ioctl", &[0, request], libc::EPERM);
        for bit in 32..64 {
            wall.denies("ioctl", &[0, request | 1 << bit], libc::EPERM);
        }
    }
    // TCGETS, TIOCGWINSZ, TIOCSWINSZ, FIONREAD, TIOCSCTTY, FICLONE, TIOCGPTN, SIOCGIFCONF.
    for request in [0x5401, 0x5413, 0x5414, 0x541b, 0x540e, 0x4004_9409, 0x8004_5430, 0x8912] {
        wall.allows("ioctl", &[0, request]);
    }
}

#[test]
fn rs_01_no_page_of_the_hosts_reserve_can_be_taken() {
    let wall = Wall::new();
    let [private, huge] = [0x22, 0x4_0000];
    for rubbish in [0, RUBBISH] {
        wall.allows("mmap", &[0, 4096, 3, private | rubbish]);
        wall.denies("mmap", &[0, 4096, 3, private | huge | rubbish], libc::ENOMEM);
        wall.allows("memfd_create", &[0, 1 | 2 | rubbish]);
        wall.denies("memfd_create", &[0, 1 | 4 | rubbish], libc::EINVAL);
        wall.denies("memfd_create", &[0, 0xffff_ffff], libc::EINVAL);
        wall.allows("shmget", &[0, 4096, 0o1600 | rubbish]);
        wall.denies("shmget", &[0, 4096, 0o1600 | 0o4000 | rubbish], libc::EPERM);
    }
}

#[test]
fn what_every_program_needs_is_there() {
    let wall = Wall::new();
    wall.allows("read write openat openat2 close close_range munmap mprotect brk rt_sigaction rt_sigreturn", &[]);
    wall.allows("execve execveat fork vfork exit_group wait4 waitid pidfd_open pidfd_send_signal kill", &[]);
    wall.allows("statx newfstatat faccessat2 getdents64 renameat2 linkat unlinkat fchmodat2 copy_file_range", &[]);
    wall.allows("poll ppoll epoll_wait epoll_pwait2 eventfd2 signalfd4 timerfd_create inotify_init1", &[]);
    wall.allows("set_robust_list rseq membarrier getrandom prlimit64 mlock mseal", &[]);
    wall.allows("setresuid setresgid setgroups capset setsid ptrace chroot seccomp landlock_restrict_self", &[]);
    wall.allows("shmat semop msgsnd mq_open mbind sched_setaffinity setpriority", &[]);
    for option in [1, 4, 8, 15, 22, 24, 36, 38, 47, 0x5356_4d41, 0x5961_6d61] {
        wall.allows("prctl", &[option | RUBBISH]);
    }
    for option in [31, 33, 57, 59, 62, 67, 77, 1000] {
        wall.denies("prctl", &[option | RUBBISH], libc::EINVAL);
    }
    wall.denies("prctl", &[35], libc::EPERM);
    for advice in [4, 8, 14, 21, 23] {
        wall.allows("madvise", &[0, 0, advice]);
    }
    wall.denies("madvise", &[0, 0, RUBBISH + 12], libc::EINVAL);
}
