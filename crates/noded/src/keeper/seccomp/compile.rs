//! The compiler: a [`Policy`] and an architecture in, a classic BPF program out.
//!
//! The program first looks at the architecture, then finds the call's number by halving, then, where the
//! policy asks about arguments, compares those. It is written **from its end to its beginning**: whoever emits
//! a jump knows already where it goes, so there is nothing to patch, and a target too far for a jump's eight
//! bits gets a stepping stone in front.
//!
//! A call that is allowed whatever its arguments is decided by number and architecture alone; the kernel sees
//! that when the filter is installed and later lets such calls pass without running it (seccomp's bitmap cache,
//! Linux 5.11). Only `LD`, `AND`, `JEQ`, `JGE`, `JA` and `RET` are used, all of which that analysis understands.

use std::collections::BTreeMap;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, sock_filter,
};

use super::policy::{Action, Clause, Condition, Policy, Verdict, Width};
use super::{Arch, numbers};

/// Offsets in `struct seccomp_data`: the call's number, its architecture, its first argument.
pub const NUMBER: u32 = 0;
/// See [`NUMBER`].
pub const ARCHITECTURE: u32 = 4;
/// See [`NUMBER`]. Each argument takes eight bytes, the low half first: both architectures are little-endian.
pub const ARGUMENTS: u32 = 16;

/// Writes the program for `arch`.
pub fn program(policy: &Policy, arch: Arch) -> Vec<sock_filter> {
    let mut emitter = Emitter::default();
    let mut points = Vec::new();
    for (name, number) in numbers(arch) {
        let target = match policy.calls.get(name) {
            None => continue,
            Some(Verdict::Always(action)) => ret(*action),
            Some(Verdict::ByArguments(clauses)) => emitter.clauses(clauses),
        };
        points.push((number, target));
    }
    points.sort_unstable_by_key(|(number, _)| *number);
    let search = emitter.search(&intervals(&points, ret(policy.default)));
    let number = emitter.load(NUMBER, None, search);
    let known = emitter.branch(BPF_JEQ, arch.audit(), number, Target::Ret(SECCOMP_RET_KILL_PROCESS));
    emitter.load(ARCHITECTURE, None, known);
    emitter.reversed.reverse();
    emitter.reversed
}

/// The filter's return value for an action.
pub fn return_value(action: Action) -> u32 {
    match action {
        Action::Allow => SECCOMP_RET_ALLOW,
        Action::Errno(errno) => SECCOMP_RET_ERRNO | u32::from(errno),
    }
}

fn ret(action: Action) -> Target {
    Target::Ret(return_value(action))
}

/// Where a jump goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// To a `RET` of this value, wherever one is or will be.
    Ret(u32),
    /// To the instruction at this distance from the end.
    At(usize),
}

/// The program so far, last instruction first.
#[derive(Default)]
struct Emitter {
    reversed: Vec<sock_filter>,
    /// The nearest `RET` of each value.
    returns: BTreeMap<u32, usize>,
}

impl Emitter {
    /// Decides by the first clause that holds.
    fn clauses(&mut self, clauses: &[Clause]) -> Target {
        let mut next = Target::Ret(SECCOMP_RET_KILL_PROCESS); // never reached: the last clause always holds
        for clause in merge(clauses).iter().rev() {
            let mut holds = ret(clause.action);
            for condition in clause.conditions.iter().rev() {
                holds = self.condition(condition, holds, next);
            }
            next = holds;
        }
        next
    }

    fn condition(&mut self, condition: &Condition, holds: Target, fails: Target) -> Target {
        let (inside, outside) = if condition.negated { (fails, holds) } else { (holds, fails) };
        let low = ARGUMENTS + 8 * u32::from(condition.argument);
        let mut by_high: BTreeMap<u32, Vec<(u32, Target)>> = BTreeMap::new();
        for value in &condition.values {
            by_high.entry((value >> 32) as u32).or_default().push((*value as u32, inside));
        }
        let mut highs = Vec::new();
        for (high, lows) in by_high {
            let search = self.search(&intervals(&lows, outside));
            highs.push((high, self.load(low, Some(condition.mask as u32), search)));
        }
        if let (Width::Low32, [(_, only)]) = (condition.width, highs.as_slice()) {
            return *only;
        }
        let search = self.search(&intervals(&highs, outside));
        self.load(low + 4, Some((condition.mask >> 32) as u32), search)
    }

    /// Finds the interval the accumulator lies in, by halving. Each pair is an interval's first value and its
    /// target; the first begins at 0, the last ends at the largest number.
    fn search(&mut self, intervals: &[(u32, Target)]) -> Target {
        match intervals {
            [] => Target::Ret(SECCOMP_RET_KILL_PROCESS), // there is always one, see `intervals`
            [(_, only)] => *only,
            [(_, below), (value, target), (after, above)] if below == above && *after == value + 1 => {
                self.branch(BPF_JEQ, *value, *target, *below)
            }
            _ => {
                let (left, right) = intervals.split_at(intervals.len() / 2);
                let boundary = right.first().map_or(0, |(start, _)| *start);
                let right = self.search(right);
                let left = self.search(left);
                self.branch(BPF_JGE, boundary, right, left)
            }
        }
    }

    fn branch(&mut self, comparison: u32, value: u32, holds: Target, fails: Target) -> Target {
        if holds == fails {
            return holds;
        }
        let holds = self.reachable(holds);
        let fails = self.reachable(fails);
        let here = self.reversed.len();
        // `reachable` promises that both distances fit.
        self.push(BPF_JMP | comparison | BPF_K, (here - holds - 1) as u8, (here - fails - 1) as u8, value)
    }

    /// Loads four bytes of `struct seccomp_data`, masks them, and goes on at `next`.
    fn load(&mut self, offset: u32, mask: Option<u32>, next: Target) -> Target {
        if next.ne(&self.top()) {
            self.go(next);
        }
        if let Some(mask) = mask.filter(|mask| *mask != u32::MAX) {
            self.push(BPF_ALU | BPF_AND | BPF_K, 0, 0, mask);
        }
        self.push(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset)
    }

    /// The distance from the end of an instruction that leads to `target` and is near enough for the jump that
    /// follows, even when one more stepping stone comes between.
    fn reachable(&mut self, target: Target) -> usize {
        let at = match target {
            Target::At(at) => Some(at),
            Target::Ret(value) => self.returns.get(&value).copied(),
        };
        match at {
            Some(at) if self.reversed.len() - at < usize::from(u8::MAX) => at,
            _ => {
                self.go(target);
                self.reversed.len() - 1
            }
        }
    }

    /// Emits an instruction that does nothing but lead to `target`.
    fn go(&mut self, target: Target) {
        let here = self.reversed.len();
        match target {
            Target::At(at) => self.push(BPF_JMP | BPF_JA, 0, 0, (here - at - 1) as u32),
            Target::Ret(value) => {
                self.returns.insert(value, here);
                self.push(BPF_RET | BPF_K, 0, 0, value)
            }
        };
    }

    fn push(&mut self, code: u32, jt: u8, jf: u8, k: u32) -> Target {
        self.reversed.push(sock_filter { code: code as u16, jt, jf, k });
        self.top()
    }

    fn top(&self) -> Target {
        Target::At(self.reversed.len().wrapping_sub(1))
    }
}

/// Makes one search of neighbouring lines that answer alike and ask for values of the same argument.
fn merge(clauses: &[Clause]) -> Vec<Clause> {
    let mut merged: Vec<Clause> = Vec::new();
    for clause in clauses {
        if let (Some(before), [condition]) = (merged.last_mut(), clause.conditions.as_slice())
            && let [known] = before.conditions.as_mut_slice()
            && before.action == clause.action
            && !(known.negated || condition.negated)
            && (known.argument, known.width, known.mask) == (condition.argument, condition.width, condition.mask)
        {
            known.values.extend(&condition.values);
        } else {
            merged.push(clause.clone());
        }
    }
    merged
}

/// Turns single values, in rising order, into intervals over all numbers; what lies between gets `other`.
fn intervals(points: &[(u32, Target)], other: Target) -> Vec<(u32, Target)> {
    let mut starts: Vec<(u32, Target)> = Vec::with_capacity(2 * points.len() + 1);
    let mut append = |start: u32, target: Target| match starts.last_mut() {
        Some((last, before)) if *last == start => *before = target,
        _ => starts.push((start, target)),
    };
    append(0, other);
    for (value, target) in points {
        append(*value, *target);
        if let Some(after) = value.checked_add(1) {
            append(after, other);
        }
    }
    starts.dedup_by_key(|(_, target)| *target);
    starts
}
