//! Kernels made by hand: each a few bytes of machine code, or a header with one thing wrong.

use std::fs;
use std::path::PathBuf;

use tests::sandbox::Sandbox;

/// Where their code is loaded and entered, in long mode.
const ENTRY: u64 = 16 << 20;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// An ELF kernel, its fields as a test wants them.
pub(crate) struct Elf {
    /// 2 is 64 bit.
    pub(crate) class: u8,
    /// 62 is x86-64.
    pub(crate) machine: u16,
    /// How much of the file the program header claims there is.
    pub(crate) file_bytes: u64,
    /// How much memory it claims.
    pub(crate) memory_bytes: u64,
    /// What is at the entry point.
    pub(crate) code: Vec<u8>,
}

impl Elf {
    pub(crate) fn with(code: &[u8]) -> Self {
        let bytes = code.len() as u64;
        Self { class: 2, machine: 62, file_bytes: bytes, memory_bytes: bytes, code: code.into() }
    }

    pub(crate) fn write(&self, sandbox: &Sandbox, name: &str) -> PathBuf {
        let mut elf = vec![0x7f, b'E', b'L', b'F', self.class, 1, 1, 0];
        elf.resize(16, 0);
        elf.extend(2_u16.to_le_bytes());
        elf.extend(self.machine.to_le_bytes());
        elf.extend(1_u32.to_le_bytes());
        elf.extend(ENTRY.to_le_bytes());
        elf.extend((ELF_HEADER as u64).to_le_bytes());
        elf.extend([0; 12]);
        for field in [ELF_HEADER as u16, PROGRAM_HEADER as u16, 1, 64, 0, 0] {
            elf.extend(field.to_le_bytes());
        }
        // One loadable segment, readable and executable.
        elf.extend(1_u32.to_le_bytes());
        elf.extend(5_u32.to_le_bytes());
        let offset = (ELF_HEADER + PROGRAM_HEADER) as u64;
        for field in [offset, ENTRY, ENTRY, self.file_bytes, self.memory_bytes, 1] {
            elf.extend(field.to_le_bytes());
        }
        elf.extend(&self.code);
        let path = sandbox.file(name);
        fs::write(&path, elf).expect("a file in the sandbox");
        path
    }
}

/// `ud2` without an IDT: a triple fault.
pub(crate) const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];

/// Says to the panic port that it has panicked.
pub(crate) const PANIC: &[u8] = &[
    0x66, 0xba, 0x05, 0x05, // mov dx, 0x505
    0xb0, 0x01, // mov al, 1
    0xee, // out dx, al
    0xeb, 0xfe, // jmp $
];

/// Resets as chipsets do, by port 0xcf9.
pub(crate) const PCI_RESET: &[u8] = &[
    0x66, 0xba, 0xf9, 0x0c, // mov dx, 0xcf9
    0xb0, 0x02, 0xee, // mov al, 2; out dx, al
    0xb0, 0x06, 0xee, // mov al, 6; out dx, al
    0xeb, 0xfe, // jmp $
];

/// `jmp $`: never says anything.
pub(crate) const SILENCE: &[u8] = &[0xeb, 0xfe];

/// Writes rubbish of every width to every port and reads it back, then resets.
pub(crate) const RUBBISH: &[u8] = &[
    0x31, 0xd2, // xor edx, edx
    0xb8, 0x58, 0, 0,
    0, // again: mov eax, 0x58; small, because one port takes it for milliseconds to idle, and of no bit that ends a VM
    0xee, 0x66, 0xef, 0xef, // out dx, al; out dx, ax; out dx, eax
    0xec, 0x66, 0xed, 0xed, // in al, dx; in ax, dx; in eax, dx
    0x66, 0xff, 0xc2, // inc dx
    0x75, 0xee, // jnz again
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al: the keyboard controller's reset
    0xeb, 0xfe, // jmp $
];
