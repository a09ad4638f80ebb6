//! A service that applies a request, checks its backends for ever, and applies it
//! again when a verdict changes.

pub mod tracker;
