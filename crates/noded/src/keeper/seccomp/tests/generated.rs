//! KS-08: the compiled program equals the policy, on both architectures, rule by rule and argument by argument.

use std::collections::BTreeSet;

use super::super::compile::return_value;
use super::super::policy::{Action, Clause, Policy, Verdict};
use super::super::{STANDARD, compile, table};
use super::machine::run;
use super::{ARCHES, Arch, judge, number, numbers, standard_policy};

const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// Numbers no call has, ever or yet, and all those that some call has.
fn every_number() -> impl Iterator<Item = u32> {
    let high = (10..32).flat_map(|bit| (0..=600).map(move |low| 1 << bit | low));
    (0..=600).chain(high).chain([u32::MAX, u32::MAX - 1, 0x4000_0000 - 1])
}

/// For each argument that a rule asks about: its values, their neighbours, each with one bit turned.
fn interesting(clauses: &[Clause]) -> [Vec<u64>; 6] {
    let mut found: [BTreeSet<u64>; 6] = Default::default();
    for condition in clauses.iter().flat_map(|clause| &clause.conditions) {
        let values = &mut found[usize::from(condition.argument)];
        values.extend([0, 1, u64::MAX, u64::from(u32::MAX), 1 << 32, !condition.mask, condition.mask]);
        for value in &condition.values {
            values.extend([*value, value.wrapping_add(1), value.wrapping_sub(1), value | !condition.mask]);
            values.extend((0..64).map(|bit| value ^ (1 << bit)));
        }
    }
    found.map(|values| if values.is_empty() { vec![0] } else { values.into_iter().collect() })
}

/// Every argument list worth trying: each interesting value of one argument with each chosen value of the others.
fn argument_lists(clauses: &[Clause]) -> Vec<[u64; 6]> {
    let values = interesting(clauses);
    // The values named in the policy, for the arguments that are not being varied at the moment.
    let mut named: [BTreeSet<u64>; 6] = Default::default();
    for condition in clauses.iter().flat_map(|clause| &clause.conditions) {
        let argument = usize::from(condition.argument);
        named[argument].extend(&condition.values);
        named[argument].extend([0, 0xffff_fff0]);
    }
    let mut lists = Vec::new();
    for varied in 0..6 {
        let mut partial = vec![[0_u64; 6]];
        for argument in 0..6 {
            let choices: Vec<u64> = if argument == varied {
                values[argument].clone()
            } else {
                named[argument].iter().copied().chain(named[argument].is_empty().then_some(0)).collect()
            };
            partial = partial
                .iter()
                .flat_map(|list| {
                    choices.iter().map(move |choice| {
                        let mut list = *list;
                        list[argument] = *choice;
                        list
                    })
                })
                .collect();
        }
        if values[varied].len() > 1 {
            lists.extend(partial);
        }
    }
    lists
}

#[test]
fn ks_08_the_compiled_program_equals_the_policy() {
    let policy = standard_policy();
    for arch in ARCHES {
        let program = compile(STANDARD, arch).unwrap();
        let run = |number, arguments| run(program.as_slice(), arch.audit(), number, arguments).value;
        for number in every_number() {
            for arguments in [[0; 6], [u64::MAX; 6], [1, 2, 3, 4, 5, 6]] {
                let expected = return_value(judge(&policy, arch, number, arguments));
                assert_eq!(run(number, arguments), expected, "{arch:?} {number} {arguments:x?}");
            }
        }
        let (mut tried, mut reached) = (0, 0);
        for (name, number) in numbers(arch) {
            let Some(Verdict::ByArguments(clauses)) = policy.calls.get(name) else { continue };
            let mut answers = BTreeSet::new();
            for arguments in argument_lists(clauses) {
                let expected = judge(&policy, arch, number, arguments);
                assert_eq!(run(number, arguments), return_value(expected), "{arch:?} {name} {arguments:x?}");
                answers.insert(expected);
                tried += 1;
            }
            // Each action of the rule was among the answers: no line of it is dead.
            let written: BTreeSet<Action> = clauses.iter().map(|clause| clause.action).collect();
            assert_eq!(answers, written, "{arch:?} {name}");
            reached += 1;
        }
        assert!(tried > 20_000 && reached > 10, "{tried} lists for {reached} calls");
    }
}

#[test]
fn ks_08_every_line_of_every_rule_decides_for_some_arguments() {
    let policy = standard_policy();
    for (name, verdict) in &policy.calls {
        let Verdict::ByArguments(clauses) = verdict else { continue };
        let lists = argument_lists(clauses);
        for dead in 0..clauses.len() - 1 {
            let mut shorter: Policy = policy.clone();
            let mut rest = clauses.clone();
            rest.remove(dead);
            shorter.calls.insert(name.clone(), Verdict::ByArguments(rest));
            let arch = ARCHES.into_iter().find(|arch| numbers(*arch).contains_key(name.as_str())).unwrap();
            let nr = number(arch, name);
            let changed = lists.iter().any(|list| judge(&policy, arch, nr, *list) != judge(&shorter, arch, nr, *list));
            assert!(changed, "line {dead} of {name} changes nothing");
        }
    }
}

#[test]
fn ks_08_an_unlisted_number_is_denied_and_a_listed_one_is_as_written() {
    let policy = standard_policy();
    for arch in ARCHES {
        let program = compile(STANDARD, arch).unwrap();
        let by_number: std::collections::BTreeMap<u32, &str> =
            numbers(arch).into_iter().map(|(name, number)| (number, name)).collect();
        let mut allowed = 0;
        for number in every_number() {
            let found = run(program.as_slice(), arch.audit(), number, [0; 6]);
            match by_number.get(&number).and_then(|name| policy.calls.get(*name)) {
                None => assert_eq!(found.value, NO_SUCH_CALL, "{arch:?} {number}"),
                Some(Verdict::Always(Action::Allow)) => {
                    assert_eq!(found.value, libc::SECCOMP_RET_ALLOW, "{arch:?} {number}");
                    // What the kernel's bitmap cache asks for: such a call then costs nothing.
                    assert!(!found.read_arguments, "{arch:?} {number}");
                    allowed += 1;
                }
                Some(Verdict::Always(Action::Errno(errno))) => {
                    assert_eq!(found.value, libc::SECCOMP_RET_ERRNO | u32::from(*errno), "{arch:?} {number}");
                }
                Some(Verdict::ByArguments(_)) => assert!(found.read_arguments, "{arch:?} {number}"),
            }
        }
        assert_eq!(allowed, program.facts().allowed, "{arch:?}");
    }
}

#[test]
fn ks_14_a_foreign_entry_kills_and_an_x32_number_does_not_exist() {
    for arch in ARCHES {
        let program = compile(STANDARD, arch).unwrap();
        let others = [0x4000_0003, 0x4000_0028, 0xc000_003e, 0xc000_00b7, 0x8000_00b7, 0, u32::MAX];
        for foreign in others.into_iter().filter(|other| *other != arch.audit()) {
            for number in every_number() {
                let found = run(program.as_slice(), foreign, number, [0; 6]);
                assert_eq!(found.value, libc::SECCOMP_RET_KILL_PROCESS, "{arch:?} {foreign:#x} {number}");
            }
        }
        for number in 0..=600 {
            let found = run(program.as_slice(), arch.audit(), 0x4000_0000 | number, [0; 6]);
            assert_eq!(found.value, NO_SUCH_CALL, "{arch:?} {number}");
        }
    }
}

#[test]
fn a_number_is_found_in_few_steps_and_the_program_is_short() {
    for arch in ARCHES {
        let program = compile(STANDARD, arch).unwrap();
        assert!(program.as_slice().len() < 512, "{}", program.as_slice().len());
        assert_eq!(program.as_slice().len(), program.facts().instructions);
        for (name, number) in numbers(arch) {
            let run = run(program.as_slice(), arch.audit(), number, [0; 6]);
            assert!(run.read_arguments || run.steps <= 14, "{arch:?} {name}: {} steps", run.steps);
            assert!(run.steps <= 40, "{arch:?} {name}: {} steps", run.steps);
        }
    }
}

#[test]
fn the_table_is_sorted_and_agrees_with_the_c_library() {
    assert!(table::SYSCALLS.is_sorted_by(|left, right| left.0 < right.0));
    for arch in ARCHES {
        let distinct: BTreeSet<u32> = numbers(arch).into_values().collect();
        assert_eq!(distinct.len(), numbers(arch).len(), "{arch:?}");
    }
    macro_rules! same {
        ($($name:ident)*) => { [$((stringify!($name).strip_prefix("SYS_").unwrap(), libc::$name)),*] };
    }
    for (name, expected) in same![
        SYS_read SYS_write SYS_close SYS_mmap SYS_ioctl SYS_socket SYS_socketpair SYS_setsockopt SYS_clone SYS_execve
        SYS_unshare SYS_setns SYS_mknodat SYS_personality SYS_prctl SYS_ptrace SYS_futex SYS_madvise SYS_seccomp
        SYS_bpf SYS_userfaultfd SYS_perf_event_open SYS_mount SYS_umount2 SYS_pivot_root SYS_openat2 SYS_statx
        SYS_clone3 SYS_io_uring_setup SYS_open_tree SYS_move_mount SYS_fsopen SYS_pidfd_getfd SYS_close_range
        SYS_landlock_restrict_self SYS_memfd_create SYS_faccessat2 SYS_epoll_pwait2 SYS_futex_waitv SYS_mseal
    ] {
        assert_eq!(i64::from(number(Arch::NATIVE, name)), expected, "{name}");
    }
}
