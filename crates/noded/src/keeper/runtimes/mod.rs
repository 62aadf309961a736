//! The walls that a sandbox can stand in.

pub mod native;
