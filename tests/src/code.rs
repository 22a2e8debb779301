//! Machine code for tiny guests: x86-64, ring 0, one to one mapped below 4 GiB.
//!
//! Straight-line code, written out by the test: where the processor's ring 0 is emulated one
//! instruction at a time (PVM), that costs no more than a loop, and the test knows every value the
//! guest will write.

/// Port of the console.
pub const COM1: u16 = 0x3f8;
/// Port of the control channel.
pub const COM2: u16 = 0x2f8;

/// How wide an access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 1 byte.
    Byte,
    /// 2 bytes.
    Word,
    /// 4 bytes.
    Dword,
    /// 8 bytes; memory only.
    Qword,
}

impl Width {
    /// Those that a port takes.
    pub const PORT: [Self; 3] = [Self::Byte, Self::Word, Self::Dword];
    /// Those that memory takes.
    pub const MEMORY: [Self; 4] = [Self::Byte, Self::Word, Self::Dword, Self::Qword];

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        1 << self as usize
    }

    /// The prefix that makes the opcode for dwords one of this width.
    fn prefix(self) -> &'static [u8] {
        match self {
            Self::Word => &[0x66],
            Self::Qword => &[0x48],
            Self::Byte | Self::Dword => &[],
        }
    }

    /// The opcode for bytes or its neighbour for everything wider.
    fn of(self, byte: u8) -> u8 {
        byte + u8::from(self != Self::Byte)
    }
}

/// Code that grows at its end.
#[derive(Clone, Debug, Default)]
pub struct Code(Vec<u8>);

impl Code {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Appends instructions as they are.
    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Appends what `each` makes of every item.
    #[must_use]
    pub fn each<T>(self, items: impl IntoIterator<Item = T>, each: impl FnMut(Self, T) -> Self) -> Self {
        items.into_iter().fold(self, each)
    }

    /// Writes `value` to a port.
    #[must_use]
    pub fn port_write(self, width: Width, port: u16, value: u32) -> Self {
        // mov eax, value; mov dx, port; out dx, (e)a(x/l)
        self.raw(&[0xb8])
            .raw(&value.to_le_bytes())
            .raw(&[0x66, 0xba])
            .raw(&port.to_le_bytes())
            .raw(width.prefix())
            .raw(&[width.of(0xee)])
    }

    /// Reads a port into eax.
    #[must_use]
    pub fn port_read(self, width: Width, port: u16) -> Self {
        // mov dx, port; in (e)a(x/l), dx
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes()).raw(width.prefix()).raw(&[width.of(0xec)])
    }

    /// Writes `value`, repeated in the upper half of a qword, to memory.
    #[must_use]
    pub fn memory_write(self, width: Width, address: u32, value: u32) -> Self {
        // mov ebx, address; mov rax, value; mov [rbx], (r/e)a(x/l)
        self.raw(&[0xbb])
            .raw(&address.to_le_bytes())
            .raw(&[0x48, 0xb8])
            .raw(&value.to_le_bytes())
            .raw(&value.to_le_bytes())
            .raw(width.prefix())
            .raw(&[width.of(0x88), 0x03])
    }

    /// Reads memory into rax.
    #[must_use]
    pub fn memory_read(self, width: Width, address: u32) -> Self {
        // mov ebx, address; mov (r/e)a(x/l), [rbx]
        self.raw(&[0xbb]).raw(&address.to_le_bytes()).raw(width.prefix()).raw(&[width.of(0x8a), 0x03])
    }

    /// Sends the `width` low bytes of rax to COM1, the lowest first.
    #[must_use]
    pub fn say_rax(self, width: Width) -> Self {
        // mov dx, COM1; then for each byte: out dx, al; shr rax, 8
        let port = self.raw(&[0x66, 0xba]).raw(&COM1.to_le_bytes());
        port.each(0..width.bytes(), |code, _| code.raw(&[0xee, 0x48, 0xc1, 0xe8, 0x08]))
    }

    /// Sends `text` to a port, one byte at a time.
    #[must_use]
    pub fn say(self, port: u16, text: &str) -> Self {
        self.each(text.bytes(), |code, byte| code.port_write(Width::Byte, port, byte.into()))
    }

    /// `jmp $`.
    #[must_use]
    pub fn hang(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Starts again at the first byte, which is `len()` bytes back.
    #[must_use]
    pub fn again(self) -> Self {
        let back = -(self.0.len() as i32 + 5);
        self.raw(&[0xe9]).raw(&back.to_le_bytes())
    }

    /// Switches the machine off, and waits for that.
    #[must_use]
    pub fn power_off(self) -> Self {
        self.port_write(Width::Byte, 0x600, 0x34).hang()
    }
}

/// Numbers that look random and are the same in every run (Knuth's MMIX generator).
pub struct Rubbish(u64);

impl Rubbish {
    /// Those of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one. One in four has few bits, as the values that mean something to a device do.
    pub fn next_u32(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let value = (self.0 >> 32) as u32;
        if value & 3 == 0 { value >> 24 } else { value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_what_the_manual_says() {
        let code = Code::new()
            .port_write(Width::Word, 0x3f8, 0x41)
            .memory_read(Width::Byte, 0xd000_0000)
            .memory_write(Width::Qword, 0x1000, 1)
            .again();
        #[rustfmt::skip]
        let expected = [
            0xb8, 0x41, 0, 0, 0, 0x66, 0xba, 0xf8, 0x03, 0x66, 0xef,
            0xbb, 0, 0, 0, 0xd0, 0x8a, 0x03,
            0xbb, 0, 0x10, 0, 0, 0x48, 0xb8, 1, 0, 0, 0, 1, 0, 0, 0, 0x48, 0x89, 0x03,
            0xe9, 0xd7, 0xff, 0xff, 0xff,
        ];
        assert_eq!(code.bytes(), expected);
    }
}
