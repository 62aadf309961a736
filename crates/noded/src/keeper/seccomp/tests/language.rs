//! The policy language: what is an error, and what the compiler makes of small policies.

use super::super::compile;
use super::super::policy::{Action, Policy};
use super::machine::run;
use super::{ARCHES, Arch, judge, number};

const HEAD: &str = "const ENOSYS = 38\nconst EPERM = 1\ndefault ENOSYS\n";

#[test]
fn a_misread_policy_is_an_error_with_its_line() {
    for (body, line, message) in [
        ("allow read wriet", 4, "no architecture has a call 'wriet'"),
        ("allow", 4, "the line ends too early"),
        ("allow read\nallow write read", 5, "read was dealt with already"),
        ("allow read\ndeny EPERM read", 5, "read was dealt with already"),
        ("deny EPRM read", 4, "nothing is called 'EPRM'"),
        ("deny 0 read", 4, "0 is not an errno"),
        ("deny 4096 read", 4, "4096 is not an errno"),
        ("permit read", 4, "'permit' begins no statement"),
        ("default EPERM", 4, "there is a default already"),
        ("const A = 1", 4, "const A is used nowhere"),
        ("const EPERM = 2", 4, "const EPERM is defined already"),
        ("const A = 0xfg\ndeny A read", 4, "'0xfg' is not a number"),
        ("const A = 1 2\ndeny A read", 4, "'2' is too much"),
        ("    allow", 4, "an indented line belongs under a call"),
        ("allow read; write", 4, "';' means nothing here"),
        ("call read(fd: u32)", 4, "the last line of read must have no condition"),
        ("call read(fd: u32)\n allow if fd == 1\nallow write", 6, "the last line of read must have no condition"),
        ("call read(fd: u32)\n allow\n EPERM", 6, "nothing of read reaches this line"),
        ("call read(fd: u16)\n allow", 4, "'u16' is neither u32 nor u64"),
        ("call read(a: u32, a: u32)\n allow", 4, "two arguments are called 'a'"),
        ("call read(_, _, _, _, _, _, a: u32)\n allow", 4, "a call has at most six arguments"),
        ("call read(fd: u32)\n allow if df == 1\n EPERM", 5, "read has no argument 'df'"),
        ("call read(_, fd: u32)\n allow if _ == 1\n EPERM", 5, "read has no argument '_'"),
        ("call read(fd: u32)\n allow if fd = 1\n EPERM", 5, "'=' compares nothing"),
        ("call read(fd: u32)\n allow if fd in {}\n EPERM", 5, "nothing is called '}'"),
        ("call read(fd: u32)\n allow if fd in {1 2 1}\n EPERM", 5, "'1' stands there twice"),
        ("call read(fd: u32)\n allow if fd in {1\n EPERM", 5, "the line ends too early"),
        ("call read(fd: u32)\n allow if fd & 0xf == 16\n EPERM", 5, "'fd' can never be '16'"),
        ("call read(fd: u32)\n allow if fd == 0x100000000\n EPERM", 5, "'fd' can never be '0x100000000'"),
        ("call read(fd: u32)\n allow if fd & 0x1ffffffff == 0\n EPERM", 5, "the mask 0x1ffffffff is wider than 'fd'"),
        ("call read(fd: u32)\n allow if fd == 1 or fd == 2\n EPERM", 5, "'or' is too much"),
    ] {
        let error = compile(&format!("{HEAD}{body}\n{}", used(body)), Arch::X86_64).unwrap_err();
        assert_eq!((error.line, error.message.as_str()), (line, message), "{body}");
    }
    assert_eq!(compile("allow read\n", Arch::X86_64).unwrap_err().message, "there is no default");
}

/// A line that uses `EPERM`, so that its being unused is not what a test finds first.
fn used(body: &str) -> &'static str {
    if body.starts_with("const EPERM") || body.contains("call read") { "" } else { "deny EPERM getpid\n" }
}

#[test]
fn a_call_that_one_architecture_lacks_is_left_out_there() {
    let policy = "default 38\nallow open openat\n";
    for (arch, allowed) in [(Arch::X86_64, 2), (Arch::Aarch64, 1)] {
        assert_eq!(compile(policy, arch).unwrap().facts().allowed, allowed, "{arch:?}");
    }
}

#[test]
fn both_halves_of_a_64_bit_argument_count_and_one_of_a_32_bit_one() {
    let text = "default 38\n\
        call read(a: u64, b: u32)\n \
            allow if a in {0 7 0x100000000 0x100000007 0xffffffffffffffff}\n \
            5 if a & ~0xf0000000f == 0\n \
            6 if b not in {0 0xffffffff}\n \
            7\n";
    let policy = Policy::parse(text).unwrap();
    for arch in ARCHES {
        let program = compile(text, arch).unwrap();
        let read = number(arch, "read");
        let halves = [0, 1, 6, 7, 8, 0xf, 0x10, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff];
        for high in halves {
            for low in halves {
                let both = high << 32 | low;
                for arguments in [[both, 0, 0, 0, 0, 0], [8, both, 0, 0, 0, 0], [16, both, 0, 0, 0, 0]] {
                    let expected = super::super::compile::return_value(judge(&policy, arch, read, arguments));
                    let found = run(program.as_slice(), arch.audit(), read, arguments).value;
                    assert_eq!(found, expected, "{arch:?} {arguments:x?}");
                }
            }
        }
        assert_eq!(judge(&policy, arch, read, [7, 0, 0, 0, 0, 0]), Action::Allow);
        assert_eq!(judge(&policy, arch, read, [0xf_0000_000e, 0, 0, 0, 0, 0]), Action::Errno(5));
        assert_eq!(judge(&policy, arch, read, [1 << 40, 1 << 32, 0, 0, 0, 0]), Action::Errno(7));
    }
}

#[test]
fn a_jump_over_more_than_255_instructions_arrives() {
    let values: String = (0..3000).step_by(2).fold(String::new(), |text, value| format!("{text} {value}"));
    let text = format!("default 38\ncall read(a: u32)\n allow if a in {{{values}}}\n 9\nallow write\n");
    let policy = Policy::parse(&text).unwrap();
    let program = compile(&text, Arch::X86_64).unwrap();
    assert!(program.as_slice().len() > 1500);
    for a in 0..3100 {
        let expected = super::super::compile::return_value(judge(&policy, Arch::X86_64, 0, [a, 0, 0, 0, 0, 0]));
        assert_eq!(run(program.as_slice(), Arch::X86_64.audit(), 0, [a, 0, 0, 0, 0, 0]).value, expected, "{a}");
    }
    assert_eq!(run(program.as_slice(), Arch::X86_64.audit(), 1, [0; 6]).value, libc::SECCOMP_RET_ALLOW);
    assert_eq!(
        run(program.as_slice(), Arch::X86_64.audit(), 2, [0; 6]).value,
        libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32
    );
}

#[test]
fn a_program_longer_than_the_kernel_takes_is_an_error() {
    let values: String = (0..9000).step_by(2).fold(String::new(), |text, value| format!("{text} {value}"));
    let text = format!("default 38\ncall read(a: u32)\n allow if a in {{{values}}}\n 9\n");
    let error = compile(&text, Arch::X86_64).unwrap_err();
    assert!(error.message.contains("the kernel takes 4096"), "{error}");
}
