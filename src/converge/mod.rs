//! Brings a host to the desired state: observe, diff, apply, verify, and roll
//! back if verification fails.

pub mod outcome;
pub mod prefetch;
mod reconciler;
pub mod retry;
mod rollback;
mod warnings;

use anyhow::Result;

use crate::host::Host;
use crate::preflight;
use crate::request::Request;
use outcome::{Outcome, RunMode, Steps};
use prefetch::Prefetch;
use reconciler::{Counters, Reconciler};
use warnings::Context;

/// Does what the request asks for. `prefetch` may return dumps that were started
/// earlier; they decide only whether there is anything to do. `meanwhile` is
/// called with the steps while iptables works on them.
///
/// # Errors
/// When the host cannot be read, or the request would do harm there. Nothing
/// has been changed then. A later failure is in the [`Outcome`].
pub fn converge(
    host: &impl Host,
    request: &Request,
    mode: RunMode,
    prefetch: impl FnOnce() -> Option<Prefetch>,
    meanwhile: &mut dyn FnMut(&Steps),
) -> Result<Outcome> {
    let facts = preflight::facts(host, request);
    let mut warnings = preflight::check(request, &facts).map_err(anyhow::Error::msg)?;
    let reconciler = Reconciler::new(host, request)?;
    let prefetch = prefetch().unwrap_or_default();
    let generation = prefetch.generation();
    let counters = match generation {
        Some(_) => Counters::Read,
        None => Counters::Skip,
    };
    let state = reconciler.observe(prefetch, counters)?;
    reconciler.check_forwarding(&state)?;
    let steps = reconciler.drift(&state);
    let _lock = match mode {
        RunMode::Apply if !steps.is_empty() => Some(host.lock()?),
        RunMode::Apply | RunMode::Check => None,
    };
    let attempt = reconciler.attempt(state, steps, generation)?;
    let disconnects = reconciler.disconnects(&attempt);
    let context = Context {
        host,
        request,
        facts: &facts,
        mode,
    };
    warnings.extend(warnings::before(context, &attempt));
    let mut outcome = match mode {
        RunMode::Apply if !attempt.steps.is_empty() => {
            reconciler.apply(attempt, disconnects, meanwhile)
        }
        RunMode::Apply | RunMode::Check => reconciler.predict(attempt, disconnects),
    };
    warnings.append(&mut outcome.warnings);
    warnings.extend(warnings::after(context, &outcome));
    outcome.warnings = warnings;
    Ok(outcome)
}
