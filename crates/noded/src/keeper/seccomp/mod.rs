//! The system-call wall: a policy file, its compiler, and the one call that puts the filter on a process.
//!
//! `policy/standard.policy` says in words and names what a sandbox may ask of the kernel. [`compile`] turns it
//! into a filter when the keeper starts; [`install`] binds the process that is about to become the guest agent,
//! and with it everything it will ever run. A filter is never taken off and follows every fork and exec.

mod compile;
mod policy;
mod table;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;

pub use policy::PolicyError;

use policy::{Action, Policy, Verdict};

/// The policy every native sandbox gets.
pub const STANDARD: &str = include_str!("../../../policy/standard.policy");

/// The kernel's own limit on a program (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// An architecture the wall is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "one of them is for the tests, which compile for both wherever they run")]
pub enum Arch {
    /// 64-bit x86 by its native entry; neither i386 nor x32.
    X86_64,
    /// 64-bit Arm, little-endian.
    Aarch64,
}

impl Arch {
    /// The one this program runs on.
    #[cfg(target_arch = "x86_64")]
    pub const NATIVE: Self = Self::X86_64;
    /// The one this program runs on.
    #[cfg(target_arch = "aarch64")]
    pub const NATIVE: Self = Self::Aarch64;

    /// What the kernel calls it in `seccomp_data.arch`.
    ///
    /// Source: `linux/audit.h`: the ELF machine, marked 64-bit and little-endian.
    pub const fn audit(self) -> u32 {
        match self {
            Self::X86_64 => 0xc000_003e,
            Self::Aarch64 => 0xc000_00b7,
        }
    }
}

/// Numbers about a filter, for reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Calls that pass whatever their arguments.
    pub allowed: usize,
    /// Calls that pass with some arguments and fail with others.
    pub conditional: usize,
    /// Calls of this architecture that always fail, named in the policy or not.
    pub denied: usize,
    /// Length of the compiled program.
    pub instructions: usize,
}

/// A compiled filter.
#[derive(Debug, Clone)]
pub struct Program {
    filter: Vec<libc::sock_filter>,
    facts: Facts,
}

impl Program {
    /// The instructions, in the kernel's form.
    pub fn as_slice(&self) -> &[libc::sock_filter] {
        &self.filter
    }

    /// What it lets pass, in numbers.
    pub const fn facts(&self) -> Facts {
        self.facts
    }
}

/// Compiles a policy text for `arch`.
///
/// Raises [`PolicyError`] with the line when the text is not a policy, or without one when the program would be
/// longer than the kernel takes.
pub fn compile(policy: &str, arch: Arch) -> Result<Program, PolicyError> {
    let policy = Policy::parse(policy)?;
    let filter = compile::program(&policy, arch);
    let instructions = filter.len();
    if instructions > MAX_INSTRUCTIONS {
        let message = format!("{instructions} instructions, but the kernel takes {MAX_INSTRUCTIONS}");
        return Err(PolicyError { line: 0, message });
    }
    let mut facts = Facts { allowed: 0, conditional: 0, denied: 0, instructions };
    for (name, _) in numbers(arch) {
        match policy.calls.get(name) {
            Some(Verdict::Always(Action::Allow)) => facts.allowed += 1,
            Some(Verdict::ByArguments(_)) => facts.conditional += 1,
            Some(Verdict::Always(Action::Errno(_))) | None => facts.denied += 1,
        }
    }
    Ok(Program { filter, facts })
}

/// Compiles the standard policy for this machine.
#[expect(clippy::expect_used, reason = "the text is part of the program and the tests compile it")]
pub fn standard() -> Program {
    compile(STANDARD, Arch::NATIVE).expect("the standard policy compiles")
}

/// Binds this thread, and all that it will fork or exec, to the filter for ever.
///
/// Meant for the time between fork and exec: it allocates nothing and takes no lock. Set `no_new_privs` before
/// (the kernel wants that or `CAP_SYS_ADMIN`), and do before whatever the filter forbids. No flags: without
/// `SPEC_ALLOW` the mitigations stay as the host's administrator set them.
///
/// Source: `seccomp(2)`, `SECCOMP_SET_MODE_FILTER`.
pub fn install(program: &Program) -> io::Result<()> {
    let filter = program.as_slice();
    let program = libc::sock_fprog {
        len: filter.len() as u16, // at most MAX_INSTRUCTIONS, see `compile`
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions from `filter`, which outlives the call, and writes nothing.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The calls that `arch` has, with their numbers.
fn numbers(arch: Arch) -> BTreeMap<&'static str, u32> {
    let number = |x86_64, aarch64| match arch {
        Arch::X86_64 => x86_64,
        Arch::Aarch64 => aarch64,
    };
    table::SYSCALLS.iter().filter_map(|&(name, x86_64, aarch64)| Some((name, number(x86_64, aarch64)?))).collect()
}
