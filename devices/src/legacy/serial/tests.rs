use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

const DATA: u64 = 0;
const IER: u64 = 1;
const MCR: u64 = MCR_OFFSET as u64;
const LSR: u64 = 5;
const SCRATCH: u64 = 7;

/// A sink that takes a given number of bytes, then answers with an error.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<SinkState>>);

#[derive(Default)]
struct SinkState {
    taken: Vec<u8>,
    room: usize,
    error: Option<ErrorKind>,
}

impl Sink {
    fn with_room(room: usize) -> Self {
        let sink = Self::default();
        sink.0.lock().unwrap().room = room;
        sink
    }

    fn fail_with(&self, error: ErrorKind) {
        self.0.lock().unwrap().error = Some(error);
    }

    fn make_room(&self, room: usize) {
        self.0.lock().unwrap().room = room;
    }

    fn taken(&self) -> Vec<u8> {
        self.0.lock().unwrap().taken.clone()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        let len = bytes.len().min(state.room);
        if len == 0 {
            return Err(state.error.unwrap_or(ErrorKind::WouldBlock).into());
        }
        state.room -= len;
        state.taken.extend(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serial(sink: &Sink) -> (Serial, EventFd) {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    (Serial::new(IrqLine::new(irq.try_clone().unwrap()), Box::new(sink.clone())).unwrap(), irq)
}

fn get(serial: &mut Serial, register: u64) -> u8 {
    let mut data = [0xaa];
    serial.read(register, &mut data);
    data[0]
}

#[test]
fn output_reaches_the_sink() {
    let sink = Sink::with_room(usize::MAX);
    let (mut serial, _) = serial(&sink);
    for byte in b"hello" {
        serial.write(DATA, &[*byte]);
    }
    assert_eq!(sink.taken(), b"hello");
    assert!(!serial.has_pending_output());
}

#[test]
fn input_is_accepted_up_to_the_fifo_and_draining_it_is_announced() {
    let (mut serial, irq) = serial(&Sink::default());
    serial.write(IER, &[1]);
    assert_eq!((serial.input_room(), serial.has_input()), (FIFO_BYTES, false));
    assert!(serial.drained_fd().read().is_err());

    let bytes: Vec<u8> = (0..100).collect();
    assert_eq!(serial.input(&bytes), FIFO_BYTES);
    assert_eq!(serial.input(&bytes[FIFO_BYTES..]), 0);
    assert_eq!((serial.input_room(), serial.has_input()), (0, true));
    assert!(irq.read().is_ok());

    for expected in 0..FIFO_BYTES {
        assert_eq!(get(&mut serial, LSR) & 1, 1);
        assert!(serial.drained_fd().read().is_err(), "not before the last byte");
        assert_eq!(usize::from(get(&mut serial, DATA)), expected);
    }
    assert_eq!(get(&mut serial, LSR) & 1, 0);
    assert_eq!((serial.drained_fd().read().unwrap(), serial.has_input()), (1, false));

    // A guest that polls an empty port does not wake the event loop.
    for _ in 0..10 {
        get(&mut serial, DATA);
    }
    assert!(serial.drained_fd().read().is_err());
    assert_eq!(serial.input(&bytes[FIFO_BYTES..]), 36);
}

#[test]
fn nothing_is_accepted_in_loopback_and_the_loop_does_not_overflow() {
    let (mut serial, _) = serial(&Sink::with_room(usize::MAX));
    serial.write(MCR, &[MCR_LOOP]);
    assert_eq!(serial.input(b"x"), 0);
    serial.write(MCR, &[0]);
    assert!(serial.drained_fd().read().is_ok(), "the refused byte is asked for again");
    serial.write(MCR, &[MCR_LOOP]);
    for _ in 0..1000 {
        serial.write(DATA, &[7]);
    }
    assert_eq!(serial.input_room(), 0);
    serial.write(MCR, &[0]);
    assert_eq!(serial.input(b"x"), 0, "the guest must read its own bytes first");
}

#[test]
fn output_waits_for_a_slow_sink() {
    let sink = Sink::with_room(2);
    let (mut serial, _) = serial(&sink);
    for byte in b"abcdef" {
        serial.write(DATA, &[*byte]);
    }
    assert_eq!(sink.taken(), b"ab");
    assert!(serial.has_pending_output());
    sink.make_room(3);
    serial.flush_output();
    assert_eq!(sink.taken(), b"abcde");
    sink.make_room(usize::MAX);
    serial.write(DATA, b"g");
    assert_eq!(sink.taken(), b"abcdefg");
    assert_eq!((serial.has_pending_output(), serial.lost_output_bytes()), (false, 0));
}

#[test]
fn the_backlog_is_bounded_and_keeps_the_oldest() {
    let sink = Sink::default();
    let (mut serial, _) = serial(&sink);
    for i in 0..OUTPUT_BACKLOG_BYTES + 10 {
        serial.write(DATA, &[i as u8]);
    }
    assert_eq!(serial.lost_output_bytes(), 10);
    sink.make_room(usize::MAX);
    serial.flush_output();
    let expected: Vec<u8> = (0..OUTPUT_BACKLOG_BYTES).map(|i| i as u8).collect();
    assert_eq!(sink.taken(), expected);
}

#[test]
fn a_closed_sink_loses_bytes_and_nothing_else() {
    let sink = Sink::default();
    sink.fail_with(ErrorKind::BrokenPipe);
    let (mut serial, _) = serial(&sink);
    for _ in 0..100 {
        serial.write(DATA, b"x");
    }
    assert_eq!((serial.lost_output_bytes(), serial.has_pending_output()), (100, false));
    sink.make_room(usize::MAX);
    serial.write(DATA, b"y");
    assert_eq!(sink.taken(), b"y");
}

#[test]
fn a_wide_access_is_split_into_registers() {
    let (mut serial, _) = serial(&Sink::default());
    serial.write(MCR + 2, &[0, 0x5a]);
    assert_eq!(get(&mut serial, SCRATCH), 0x5a);
    let mut data = [0xaa; 4];
    serial.read(4, &mut data);
    assert_eq!(data[3], 0x5a);
}

proptest! {
    /// Whatever the guest does to the registers, input is never lost, repeated or reordered, unless
    /// the guest itself used loopback.
    #[test]
    fn input_survives_any_register_access(
        steps in prop::collection::vec((0u8..3, 1u64..8, any::<u8>()), 0..300),
    ) {
        let (mut serial, _) = serial(&Sink::with_room(usize::MAX));
        let (mut offered, mut next) = (0u8, 0u8);
        for (kind, register, value) in steps {
            match kind {
                0 => {
                    if serial.input(&[offered]) == 1 {
                        offered = offered.wrapping_add(1);
                    }
                }
                1 => serial.write(register, &[if register == MCR { value & !MCR_LOOP } else { value }]),
                _ => {
                    get(&mut serial, register);
                    serial.write(3, &[3]);
                    if serial.has_input() {
                        prop_assert_eq!(get(&mut serial, DATA), next);
                        next = next.wrapping_add(1);
                    }
                }
            }
            prop_assert_eq!(serial.input_room() < FIFO_BYTES, serial.has_input());
        }
    }
}

#[test]
fn a_port_goes_on_with_what_was_not_read_and_not_written() {
    let sink = Sink::with_room(1);
    let line = || IrqLine::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let mut port = Serial::new(line(), Box::new(sink.clone())).unwrap();
    port.write(SCRATCH, &[0x5a]);
    port.write(IER, &[1]);
    port.write(DATA, b"a");
    port.write(DATA, b"b");
    port.input(b"xyz");
    let saved = port.save();
    assert_eq!((&saved.input[..], &saved.output[..]), (&b"xyz"[..], &b"b"[..]));
    let (irq, sink) = (EventFd::new(EFD_NONBLOCK).unwrap(), Sink::with_room(9));
    let mut next = Serial::new(IrqLine::new(irq.try_clone().unwrap()), Box::new(sink.clone())).unwrap();
    next.restore(&saved).unwrap();
    assert_eq!(next.save(), saved);
    assert!(irq.read().is_ok(), "it was to be interrupted for its input");
    let mut read = [0; 3];
    read.iter_mut().for_each(|byte| next.read(DATA, std::slice::from_mut(byte)));
    assert_eq!(&read, b"xyz");
    assert!(next.drained_fd().read().is_ok());
    next.flush_output();
    assert_eq!(sink.taken(), b"b");
    let mut scratch = [0];
    next.read(SCRATCH, &mut scratch);
    assert_eq!(scratch, [0x5a]);
    for bad in [
        SerialState { input: vec![0; 65], ..SerialState::default() },
        SerialState { output: vec![0; OUTPUT_BACKLOG_BYTES + 1], ..SerialState::default() },
    ] {
        assert!(next.restore(&bad).is_err());
    }
}

proptest! {
    #[test]
    fn no_registers_make_a_port_panic(registers: [u8; 9], input in prop::collection::vec(any::<u8>(), 0..64)) {
        let irq = IrqLine::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut port = Serial::new(irq, Box::new(Sink::with_room(9))).unwrap();
        port.restore(&SerialState { registers, input, output: Vec::new() }).unwrap();
        for offset in 0..SERIAL_LEN {
            let mut byte = [0];
            port.read(offset, &mut byte);
            port.write(offset, &byte);
        }
    }
}
