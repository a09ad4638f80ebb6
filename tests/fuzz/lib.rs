//! The bodies of the fuzz targets are those of the tests.
//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz host`

#[path = "../suite/fake.rs"]
#[allow(dead_code, missing_docs)]
mod fake;
#[path = "../suite/fuzzed.rs"]
pub mod fuzzed;
#[path = "../suite/model.rs"]
#[allow(dead_code)]
mod model;
