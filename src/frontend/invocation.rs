//! A request in JSON together with the two names that stand beside it there.

use serde_json::Value;

use crate::converge::outcome::RunMode;
use crate::request::{BadRequest, UncheckedRequest, flag, json};

/// What was asked, and how it is to be answered.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// What is to be there.
    pub request: UncheckedRequest,
    /// `check`: whether it is only foretold.
    pub run: RunMode,
    /// `diff`: whether before and after are wanted.
    pub diff: bool,
}

impl Invocation {
    /// Reads a JSON object.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let value =
            json::parse(text).map_err(|error| format!("the request is not JSON: {error}"))?;
        let Value::Object(mut object) = value else {
            return Err("the request is not a JSON object".to_owned());
        };
        let mut set = |name: &str| {
            object
                .remove(name)
                .map_or(Ok(false), |value| flag(name, &value))
        };
        let flags = set("check").and_then(|check| Ok((check, set("diff")?)));
        let checked = flags.and_then(|(check, diff)| -> Result<Self, BadRequest> {
            Ok(Self {
                run: if check {
                    RunMode::Check
                } else {
                    RunMode::Apply
                },
                diff,
                request: UncheckedRequest::from_json(object)?,
            })
        });
        checked.map_err(|error| error.to_string())
    }
}
