//! Leaving the guest so that the host can tell it from a crash.

use foliant_guest::protocol::EXIT_PORT;

/// Ends QEMU with the exit status that belongs to `code`. Nothing is flushed: what wasn't written is lost, as in a
/// power cut.
pub(crate) fn power_off(code: u8) -> ! {
    let allowed = allow_port();
    if allowed.is_ok() {
        write_port(code);
    }
    // Reached only where the device is missing: the kernel panics when its first process ends, which the host sees.
    panic!("QEMU goes on after a write to its exit port ({allowed:?}); it needs -device isa-debug-exit");
}

#[expect(unsafe_code, reason = "I/O ports have no safe interface")]
fn allow_port() -> std::io::Result<()> {
    // SAFETY: the call changes what this thread may do with one I/O port, and no memory.
    match unsafe { libc::ioperm(EXIT_PORT.into(), 1, 1) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[expect(unsafe_code, reason = "I/O ports have no safe interface")]
fn write_port(code: u8) {
    // SAFETY: the port was allowed to this thread by `allow_port`, belongs to QEMU's exit device, and the instruction
    // touches no memory.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") EXIT_PORT, in("al") code, options(nomem, nostack, preserves_flags));
    }
}
