//! Placeholder while the kernel comes first.
#![no_std]
#![no_main]
#[path = "../runtime.rs"]
mod runtime;
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    loop {}
}
