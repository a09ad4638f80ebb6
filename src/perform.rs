//! A request on this host: what every front end that acts has in common.

use anyhow::{Result, anyhow};

use crate::converge::converge;
use crate::glance::{Glance, Glancing};
use crate::host::{System, lookup};
use crate::outcome::{Outcome, Run};
use crate::report::Report;
use crate::request::{BadRequest, Draft, Request, State};

/// Carries out a request, or foretells what that would do; with before and
/// after, if `diff`.
#[must_use]
pub fn on_this_host(draft: &Draft, run: Run, diff: bool) -> Report {
    let about = (&draft.name, draft.state);
    match perform(draft, run) {
        Ok((request, outcome)) => Report::new(&request, &outcome, run, diff),
        Err(error) if error.is::<BadRequest>() => Report::unread(about, error.to_string()),
        Err(error) => Report::unread(about, format!("{error:#}; nothing was changed")),
    }
}

/// The host is read while it is worked out what it should have. What is wrong
/// with the request is said before what is wrong with the host.
fn perform(draft: &Draft, run: Run) -> Result<(Request, Outcome)> {
    let opened = System::open(draft.variant, draft.wait);
    let host = opened.as_ref().ok();
    let host_to_read = host.filter(|_| draft.state == State::Present);
    let glancing = host_to_read.map(|host| Glance::begin(host, &draft.name));
    let request = draft.resolve(&lookup)?;
    let host = opened.as_ref().map_err(|error| anyhow!("{error:#}"))?;
    let outcome = converge(host, &request, run, || glancing.map(Glancing::finish))?;
    Ok((request, outcome))
}
