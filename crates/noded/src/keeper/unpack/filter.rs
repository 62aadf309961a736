//! The worker's system-call filter: the calls that reading, inflating and unpacking need.
//!
//! Everything else kills the worker. Nothing here can start a process, open a socket, change an id
//! or a mount, or make memory executable.
//!
//! Source: `seccomp(2)`, `linux/filter.h`, `linux/audit.h`.

use super::super::error::{Error, Result};

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Calls allowed with any arguments.
const PLAIN: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_mkdirat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_fchownat,
    libc::SYS_fchmod,
    libc::SYS_fsetxattr,
    libc::SYS_utimensat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_geteuid,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_madvise,
    // What std and the C library do by themselves: checks of descriptors, hash seeds, aborting.
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    libc::SYS_restart_syscall,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Calls whose third argument must not have `PROT_EXEC`.
const NO_EXEC: &[libc::c_long] = &[libc::SYS_mmap, libc::SYS_mprotect];

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_SET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Offsets in `struct seccomp_data`; arguments are eight bytes, the low half first on both machines.
const NUMBER: u32 = 0;
const MACHINE: u32 = 4;
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

const fn step(code: u16, value: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt: yes, jf: no, k: value }
}

/// The program: the machine, then one rule after another, and death at the end.
fn program() -> Vec<libc::sock_filter> {
    let allow = step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0);
    let kill = step(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0);
    let mut program =
        vec![step(LOAD, MACHINE, 0, 0), step(JUMP_EQUAL, ARCHITECTURE, 1, 0), kill, step(LOAD, NUMBER, 0, 0)];
    for number in PLAIN {
        program.extend([step(JUMP_EQUAL, *number as u32, 0, 1), allow]);
    }
    for number in NO_EXEC {
        program.extend([
            step(JUMP_EQUAL, *number as u32, 0, 4),
            step(LOAD, argument(2), 0, 0),
            step(JUMP_SET, libc::PROT_EXEC as u32, 0, 1),
            kill,
            allow,
        ]);
    }
    // A whiteout is the one node it may make: a character device 0:0.
    program.extend([
        step(JUMP_EQUAL, libc::SYS_mknodat as u32, 0, 7),
        step(LOAD, argument(2), 0, 0),
        step(JUMP_EQUAL, libc::S_IFCHR, 0, 4),
        step(LOAD, argument(3), 0, 0),
        step(JUMP_EQUAL, 0, 0, 2),
        allow,
        kill,
        kill,
    ]);
    // x32 numbers have a bit of their own, so they are in no list above and end here.
    program.push(kill);
    program
}

/// Puts the filter on this process for good. `no_new_privs` must be set.
///
/// # Errors
///
/// The kernel's word.
pub fn install() -> Result<()> {
    let mut program = program();
    let prog = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: `prog` describes a live program of the length said; the kernel copies it.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const prog) };
    if done < 0 { Err(Error::last("seccomp", "filter")) } else { Ok(()) }
}
