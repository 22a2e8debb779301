//! A panic leaves the terminal as it was. Without a test harness: the program under test is this
//! one, with the argument `panic`.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};
use std::{env, panic, thread};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::tcgetattr;

#[path = "../src/top/screen.rs"]
#[expect(dead_code, reason = "it draws nothing here")]
mod screen;

fn main() {
    match env::args().nth(1).as_deref() {
        Some("panic") => panic_on_the_screen(),
        // What a harness is asked to do: there is one test, whatever the filter.
        Some("--list") => println!("a_panic_leaves_the_terminal_as_it_was: test"),
        _ => {
            a_panic_leaves_the_terminal_as_it_was();
            println!("test a_panic_leaves_the_terminal_as_it_was ... ok");
        }
    }
}

fn panic_on_the_screen() {
    let _screen = screen::Screen::open().unwrap();
    // Not by unwinding: the shipped program aborts.
    let ours = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        ours(panic);
        std::process::abort();
    }));
    panic!("on purpose");
}

fn a_panic_leaves_the_terminal_as_it_was() {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).and_then(|()| unlockpt(&master)).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let modes = || {
        let modes = tcgetattr(&terminal).unwrap();
        (modes.input_modes, modes.output_modes, modes.local_modes)
    };
    let before = modes();
    let side = || Stdio::from(terminal.try_clone().unwrap());
    let mut child = Command::new(env::current_exe().unwrap())
        .arg("panic")
        .stdin(side())
        .stdout(side())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut from = File::from(master);
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        let mut bytes = [0; 1024];
        // Ends by an error once the other side is closed.
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            all.extend_from_slice(&bytes[..count]);
        }
        String::from_utf8_lossy(&all).into_owned()
    });
    assert!(!child.wait().unwrap().success());
    assert_eq!(modes(), before);
    drop(terminal);
    let printed = reader.join().unwrap();
    let (entered, left) = (printed.rfind("\u{1b}[?1049h"), printed.rfind("\u{1b}[?1049l"));
    assert!(
        entered.is_some() && left > entered && printed[left.unwrap()..].contains("\u{1b}[?25h"),
        "{printed:?}"
    );
}
