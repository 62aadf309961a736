//! The filter in the kernel: children of this test bind themselves to it and try.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;

use super::super::policy::Action;
use super::super::{install, standard};
use super::{Arch, judge, number, standard_policy};

/// How a child under the filter ended.
#[derive(Debug, PartialEq, Eq)]
enum End<const N: usize> {
    /// With these results; an errno stands there negative, as the kernel gives it.
    Results([i64; N]),
    /// By this signal.
    Signal(i32),
}

/// Runs `body` in a child under the standard filter. The child may neither allocate nor lock.
fn under_filter<const N: usize>(body: impl FnOnce() -> [i64; N]) -> End<N> {
    let program = standard();
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills the two descriptors, which belong to this function from then on.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: the child calls only what may follow a fork of a process with threads, and ends in _exit.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: plain integers.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        let code = i32::from(install(&program).is_err());
        let results = if code == 0 { body() } else { [i64::MIN; N] };
        // SAFETY: `results` is N numbers of eight bytes; the child ends here and runs no destructor.
        unsafe {
            libc::write(ends[1], results.as_ptr().cast(), size_of_val(&results));
            libc::_exit(code)
        }
    }
    // SAFETY: both descriptors are ours; File closes them.
    let (mut reader, writer) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
    drop(writer);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    let mut status = 0;
    // SAFETY: the child is ours and was not waited for yet.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    if libc::WIFSIGNALED(status) {
        return End::Signal(libc::WTERMSIG(status));
    }
    assert_eq!(libc::WEXITSTATUS(status), 0, "the filter was not installed");
    let mut results = [0; N];
    for (result, bytes) in results.iter_mut().zip(bytes.chunks_exact(8)) {
        *result = i64::from_ne_bytes(bytes.try_into().unwrap());
    }
    End::Results(results)
}

/// One call; the result, or the errno as a negative number.
fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let [first, second, third, fourth, fifth, sixth] = arguments;
    // SAFETY: these tests pass integers, null pointers and pointers to live buffers; where a call is refused the
    // kernel looks at none of them.
    let result = unsafe { libc::syscall(number, first, second, third, fourth, fifth, sixth) };
    // SAFETY: errno is this thread's own.
    if result == -1 { -i64::from(unsafe { *libc::__errno_location() }) } else { result }
}

fn expect<const N: usize>(what: &str, calls: [(i64, [u64; 6]); N], errno: i32) {
    let found = under_filter(|| calls.map(|(number, arguments)| call(number, arguments)));
    assert_eq!(found, End::Results([-i64::from(errno); N]), "{what}");
}

#[test]
fn ks_03_the_kernel_makes_no_namespace() {
    let flags = [0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000_u64];
    expect("unshare", flags.map(|flag| (libc::SYS_unshare, [flag, 0, 0, 0, 0, 0])), libc::EPERM);
    let found = under_filter(|| {
        flags.map(|flag| {
            let child = call(libc::SYS_clone, [flag | libc::SIGCHLD as u64, 0, 0, 0, 0, 0]);
            if child == 0 {
                // SAFETY: a child that should not be ends at once.
                unsafe { libc::_exit(0) }
            }
            child
        })
    });
    assert_eq!(found, End::Results([-i64::from(libc::EPERM); 7]), "clone");
    expect("setns", [(libc::SYS_setns, [0; 6])], libc::EPERM);
    expect("clone3", [(libc::SYS_clone3, [0; 6]), (libc::SYS_clone3, [0, 88, 0, 0, 0, 0])], libc::ENOSYS);
}

#[test]
fn ks_09_to_12_the_kernel_makes_the_sockets_of_the_policy_only() {
    let policy = standard_policy();
    let socket = number(Arch::NATIVE, "socket");
    for family in 0..48_u64 {
        for kind in [1_u64, 2, 3, 4, 5, 6, 10] {
            let protocols = [0_u64, 1, 2, 6, 9, 12, 16, 17, 33, 58, 115, 132, 136, 255, 256, 262];
            let calls = protocols.map(|protocol| [family, kind, protocol, 0, 0, 0]);
            let End::Results(found) = under_filter(|| calls.map(|arguments| call(libc::SYS_socket, arguments))) else {
                panic!("killed at family {family}")
            };
            for (arguments, found) in calls.into_iter().zip(found) {
                match judge(&policy, Arch::NATIVE, socket, arguments) {
                    Action::Errno(errno) => assert_eq!(found, -i64::from(errno), "{arguments:?}"),
                    // What remains is the kernel's answer, and it is not the filter's.
                    Action::Allow => assert!(found >= 0 || found != -i64::from(libc::ENOSYS), "{arguments:?} {found}"),
                }
            }
        }
    }
    let works =
        [(1, 1, 0), (1, 5, 0), (2, 1, 0), (2, 1, 6), (2, 2, 17), (10, 1, 0), (10, 2, 0), (16, 3, 0), (16, 2, 0)];
    let End::Results(found) = under_filter(|| {
        works.map(|(family, kind, protocol)| call(libc::SYS_socket, [family, kind, protocol, 0, 0, 0]))
    }) else {
        panic!("killed")
    };
    assert!(found.into_iter().all(|descriptor| descriptor >= 0), "{found:?}");
}

#[test]
fn ks_12_the_kernel_sets_no_upper_layer() {
    let found = under_filter(|| {
        let (tcp, udp) = (call(libc::SYS_socket, [2, 1, 0, 0, 0, 0]), call(libc::SYS_socket, [2, 2, 0, 0, 0, 0]));
        let (one, tls) = (2_i32, c"tls");
        let one = (&raw const one).addr() as u64;
        [
            call(libc::SYS_setsockopt, [tcp as u64, 6, 31, tls.as_ptr().addr() as u64, 3, 0]),
            call(libc::SYS_setsockopt, [udp as u64, 17, 100, one, 4, 0]),
            call(libc::SYS_setsockopt, [tcp as u64, 6, 1, one, 4, 0]),
            call(libc::SYS_setsockopt, [tcp as u64, 1, 2, one, 4, 0]),
        ]
    });
    let refused = -i64::from(libc::ENOPROTOOPT);
    assert_eq!(found, End::Results([refused, refused, 0, 0]));
}

#[test]
fn ks_13_pr_08_ks_18_the_kernel_sees_no_forbidden_argument() {
    expect("futex", [11, 12, 0x8b, 0x18c].map(|op| (libc::SYS_futex, [0, op, 0, 0, 0, 0])), libc::ENOSYS);
    let requests = [0x5412, 0x541c, 0x5412 | 1 << 32, 0x541c | 0xff << 40, 0x5412 | 1 << 63];
    expect("ioctl", requests.map(|request| (libc::SYS_ioctl, [0, request, 0, 0, 0, 0])), libc::EPERM);
    let personas = [0x40_0000, 0x10_0000, 0x44_0000];
    expect("personality", personas.map(|persona| (libc::SYS_personality, [persona, 0, 0, 0, 0, 0])), libc::EPERM);
    let page_0 = (libc::SYS_madvise, [0, 4096, 12, 0, 0, 0]);
    expect("madvise", [page_0], libc::EINVAL);
}

#[test]
fn ks_01_to_07_the_kernel_is_not_asked() {
    expect(
        "ENOSYS",
        [
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
            libc::SYS_fsopen,
            libc::SYS_fspick,
            libc::SYS_fsmount,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_mount_setattr,
            467, // open_tree_attr
            libc::SYS_add_key,
            libc::SYS_keyctl,
            libc::SYS_request_key,
            456, // futex_requeue
            470,
            600,
            0x1000,
        ]
        .map(|number| (number, [0; 6])),
        libc::ENOSYS,
    );
    expect(
        "EPERM",
        [
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_delete_module,
            libc::SYS_kexec_load,
            libc::SYS_kexec_file_load,
            libc::SYS_reboot,
            libc::SYS_swapon,
            libc::SYS_swapoff,
            libc::SYS_acct,
            libc::SYS_open_by_handle_at,
            libc::SYS_clock_settime,
            libc::SYS_settimeofday,
            libc::SYS_adjtimex,
            libc::SYS_clock_adjtime,
            libc::SYS_syslog,
            libc::SYS_pidfd_getfd,
        ]
        .map(|number| (number, [0; 6])),
        libc::EPERM,
    );
}

#[cfg(target_arch = "x86_64")]
#[test]
fn ks_14_int_0x80_kills_and_x32_numbers_do_not_exist() {
    let found = under_filter(|| {
        let mut result: i64 = 20; // getpid of i386
        // SAFETY: getpid takes no argument and touches no memory; the kernel keeps all other registers.
        unsafe {
            std::arch::asm!("int 0x80", inout("rax") result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
        }
        [result]
    });
    assert_eq!(found, End::Signal(libc::SIGSYS));
    let numbers = [0x4000_0027, 0x4000_0000, 0x4000_0200, 0xffff_ffff];
    expect("x32", numbers.map(|number| (number, [0; 6])), libc::ENOSYS);
}

#[test]
fn pr_06_the_filter_follows_fork_and_exec_and_comes_off_by_no_call() {
    use std::os::unix::process::CommandExt;

    let program = standard();
    let mut command = std::process::Command::new("/bin/sh");
    command.args(["-c", "(cat /proc/self/status) & wait; cat /proc/$$/status"]);
    // SAFETY: two system calls, which allocate nothing.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            install(&program)
        })
    };
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().filter(|line| *line == "Seccomp:\t2").count(), 2, "{text}");
    // An inner filter that allows everything changes nothing: the stricter answer wins.
    let found = under_filter(|| {
        let allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
        let inner = libc::sock_fprog { len: 1, filter: (&raw const allow).cast_mut() };
        let pointer = (&raw const inner).addr() as u64;
        [
            call(libc::SYS_seccomp, [1, 0, pointer, 0, 0, 0]),
            call(libc::SYS_bpf, [0; 6]),
            call(libc::SYS_prctl, [libc::PR_SET_SECCOMP as u64, 0, 0, 0, 0, 0]),
        ]
    });
    assert_eq!(found, End::Results([0, -i64::from(libc::EPERM), -i64::from(libc::EINVAL)]));
}

#[test]
fn the_kernel_answers_every_number_as_the_policy_says() {
    let policy = standard_policy();
    // Every number that the filter refuses whatever the arguments may be tried: nothing happens.
    // But for two of x86_64 that the kernel's uprobes put into programs: it lets them past every filter.
    let uprobes = [335, 336];
    let numbers = (0..600_u32).chain([1 << 16, 0x4000_0001, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]);
    for number in numbers.filter(|number| !uprobes.contains(number)) {
        if let Action::Errno(errno) = judge(&policy, Arch::NATIVE, number, [0; 6]) {
            let found = under_filter(|| [call(i64::from(number), [0; 6])]);
            assert_eq!(found, End::Results([-i64::from(errno)]), "{number}");
        }
    }
}
