//! A request on this host: what every front end that acts has in common.

use anyhow::Result;

use crate::converge::converge;
use crate::host::{System, lookup};
use crate::outcome::{Outcome, Run};
use crate::report::Report;
use crate::request::{Draft, Request};

/// Carries out a request, or foretells what that would do; with before and
/// after, if `diff`.
#[must_use]
pub fn on_this_host(draft: Draft, run: Run, diff: bool) -> Report {
    let (name, state) = draft.about();
    let perform = move || -> Result<(Request, Outcome)> {
        let request = draft.resolve(&lookup)?;
        let host = System::open(request.variant, request.wait)?;
        let outcome = converge(&host, &request, run)?;
        Ok((request, outcome))
    };
    match perform() {
        Ok((request, outcome)) => Report::new(&request, &outcome, run, diff),
        Err(error) => Report::unread(&name, state, format!("{error:#}; nothing was changed")),
    }
}
