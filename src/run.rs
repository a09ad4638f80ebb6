//! A request on this host: what every front end that acts has in common.

use anyhow::{Result, anyhow};

use crate::converge::converge;
use crate::converge::outcome::{RunMode, Steps};
use crate::converge::prefetch::{PendingPrefetch, Prefetch};
use crate::host::{System, lookup};
use crate::report::{Beforehand, Report};
use crate::request::{BadRequest, DesiredState, UncheckedRequest};

/// Carries out a request, or foretells what that would do; with before and
/// after, if `diff`.
#[must_use]
pub fn on_this_host(draft: UncheckedRequest, run: RunMode, diff: bool) -> Report {
    let about = (draft.name.clone(), draft.state);
    match perform(draft, run, diff) {
        Ok(report) => report,
        Err(error) if error.is::<BadRequest>() => Report::unread(about, error.to_string()),
        Err(error) => Report::unread(about, format!("{error:#}; nothing was changed")),
    }
}

/// The host's dump waits in its pipe while it is worked out what there should
/// be. What is wrong with the request is said before what is wrong with the host.
fn perform(draft: UncheckedRequest, run: RunMode, diff: bool) -> Result<Report> {
    let opened = System::open(draft.variant, draft.wait);
    let host = opened.as_ref().ok();
    let host_to_read = host.filter(|_| draft.state == DesiredState::Present);
    let glancing = host_to_read.map(|host| Prefetch::begin(host, &draft.name));
    let request = draft.resolve(&lookup)?;
    let host = opened.as_ref().map_err(|error| anyhow!("{error:#}"))?;
    let told = Beforehand::default();
    // Worded while the host prints, or else while it takes in what is new.
    let glance = || {
        if glancing
            .as_ref()
            .is_some_and(|glancing| !glancing.is_ready())
        {
            told.word_shares(&request);
        }
        glancing.map(PendingPrefetch::finish)
    };
    let meanwhile = |steps: &Steps| {
        told.word_shares(&request);
        told.word_steps(steps);
    };
    let outcome = converge(host, &request, run, glance, meanwhile)?;
    let report = Report::new(&request, outcome, told, run, diff);
    Ok(report.with_asked(draft, request))
}
