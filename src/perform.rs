//! A request on this host: what every front end that acts has in common.

use crate::converge::{Run, converge};
use crate::host::System;
use crate::report::Report;
use crate::request::Request;

/// Carries out a request, or foretells what that would do; with before and
/// after, if `diff`.
#[must_use]
pub fn on_this_host(request: &Request, run: Run, diff: bool) -> Report {
    let outcome =
        System::open(request.variant, request.wait).and_then(|host| converge(&host, request, run));
    match outcome {
        Ok(outcome) => Report::new(request, &outcome, run, diff),
        Err(error) => Report::unread(request, format!("{error:#}; nothing was changed")),
    }
}
