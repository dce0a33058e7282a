//! The controller seen from outside: a driver played by hand, over the transport alone.

mod admin;
mod faults;
mod file;
mod host;
mod io;
mod power;
mod system;
