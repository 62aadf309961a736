//! The wall's tests: the language, the compiler against the policy (KS-08), the kernel, real programs.

mod generated;
mod kernel;
mod language;
mod machine;
mod programs;
mod walls;

use super::policy::{Action, Policy, Verdict, Width};
use super::{Arch, STANDARD, numbers};

const ARCHES: [Arch; 2] = [Arch::X86_64, Arch::Aarch64];

fn standard_policy() -> Policy {
    Policy::parse(STANDARD).unwrap()
}

/// The policy read plainly, without the compiler: what the filter must answer.
fn judge(policy: &Policy, arch: Arch, number: u32, arguments: [u64; 6]) -> Action {
    let Some(name) = numbers(arch).into_iter().find_map(|(name, n)| (n == number).then_some(name)) else {
        return policy.default;
    };
    match policy.calls.get(name) {
        None => policy.default,
        Some(Verdict::Always(action)) => *action,
        Some(Verdict::ByArguments(clauses)) => {
            for clause in clauses {
                let holds = clause.conditions.iter().all(|condition| {
                    let register = arguments[usize::from(condition.argument)];
                    let seen = match condition.width {
                        Width::Low32 => register % (1 << 32),
                        Width::Full64 => register,
                    };
                    condition.values.iter().any(|value| seen & condition.mask == *value) != condition.negated
                });
                if holds {
                    return clause.action;
                }
            }
            unreachable!("the last clause of {name} has no condition")
        }
    }
}

/// The number of a call on `arch`.
fn number(arch: Arch, name: &str) -> u32 {
    numbers(arch)[name]
}
