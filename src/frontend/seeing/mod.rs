//! The formats of `explain`.

pub mod explain;
pub mod html;
pub mod prometheus;
