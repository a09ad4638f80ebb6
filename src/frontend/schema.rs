//! The JSON Schemas, from the types that requests are read into and results
//! are written from.

use crate::explain::Explanation;
use crate::report::Report;
use crate::request::unchecked::RequestAttributes;
use crate::status::Status;

/// The schemas that can be printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The schema of a request.
    Request,
    /// The schema of a result.
    Result,
    /// The schema of an explanation.
    Explain,
    /// The schema of `status`.
    Status,
}

/// The schema as indented JSON.
#[must_use]
pub fn text(kind: Kind) -> String {
    let schema = match kind {
        Kind::Request => schemars::schema_for!(RequestAttributes),
        Kind::Result => schemars::schema_for!(Report),
        Kind::Explain => schemars::schema_for!(Explanation),
        Kind::Status => schemars::schema_for!(Status),
    };
    serde_json::to_string_pretty(&schema).unwrap_or_default()
}
