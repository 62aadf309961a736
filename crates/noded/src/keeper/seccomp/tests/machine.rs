//! A classic BPF machine, as strict as the kernel's checker.

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

/// What a filter answered and how it came to that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub value: u32,
    pub steps: usize,
    /// Whether an argument (or the instruction pointer) was looked at.
    pub read_arguments: bool,
}

/// Runs a filter on one call. Panics where the kernel would refuse the program.
pub fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> Run {
    let mut data = [0_u32; 16];
    data[0] = number;
    data[1] = arch;
    for (index, argument) in arguments.into_iter().enumerate() {
        data[4 + 2 * index] = argument as u32;
        data[5 + 2 * index] = (argument >> 32) as u32;
    }
    let (mut accumulator, mut at, mut steps, mut read_arguments) = (0_u32, 0_usize, 0, false);
    loop {
        let insn = program[at];
        at += 1;
        steps += 1;
        let code = u32::from(insn.code);
        if code == BPF_LD | BPF_W | BPF_ABS {
            assert!(insn.k.is_multiple_of(4) && insn.k < 64, "load at {}", insn.k);
            accumulator = data[insn.k as usize / 4];
            read_arguments |= insn.k >= 8;
        } else if code == BPF_ALU | BPF_AND | BPF_K {
            accumulator &= insn.k;
        } else if code == BPF_JMP | BPF_JA {
            at += insn.k as usize;
        } else if code == BPF_JMP | BPF_JEQ | BPF_K {
            at += usize::from(if accumulator == insn.k { insn.jt } else { insn.jf });
        } else if code == BPF_JMP | BPF_JGE | BPF_K {
            at += usize::from(if accumulator >= insn.k { insn.jt } else { insn.jf });
        } else if code == BPF_RET | BPF_K {
            return Run { value: insn.k, steps, read_arguments };
        } else {
            panic!("instruction {code:#x}");
        }
    }
}
