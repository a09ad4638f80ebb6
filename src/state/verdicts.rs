//! The verdicts of a watcher, for runs beside it.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{from_json, to_json};
use crate::host::since_boot;
use crate::netfilter::Endpoint;
use crate::request::Verdict;

/// The verdicts of a watcher at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdicts {
    /// The time of the last look at the backends, in milliseconds since the host was
    /// started.
    pub written_ms: u64,
    /// The time after which the file is written again, in milliseconds.
    pub interval_ms: u64,
    /// The backends that are checked.
    pub backends: Vec<Checked>,
}

/// A backend that is checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checked {
    /// Its balancer, in a set.
    pub balancer: Option<String>,
    /// Its address.
    pub address: IpAddr,
    /// Its port, as the request has it.
    pub port: Option<u16>,
    /// The verdict.
    pub health: Verdict,
    /// The reason of the last transition, or of the last failed check.
    pub reason: Option<String>,
    /// The time of the last transition, in seconds since 1970.
    pub since: u64,
}

impl Verdicts {
    /// Reads the text of a file.
    ///
    /// # Errors
    /// The reason why it is none.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        from_json(text)
    }

    /// The text of the file.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }

    /// Verdicts of this moment.
    #[must_use]
    pub fn of_now(interval: Duration, backends: Vec<Checked>) -> Self {
        Self {
            written_ms: milliseconds(since_boot()),
            interval_ms: milliseconds(interval),
            backends,
        }
    }

    /// The time since they were written; `now` is the time since the host was started.
    /// Verdicts of an earlier start are of no use, and infinitely old.
    #[must_use]
    pub fn age(&self, now: Duration) -> Duration {
        let age = milliseconds(now).checked_sub(self.written_ms);
        age.map_or(Duration::MAX, Duration::from_millis)
    }

    /// Returns true if they are not older than three intervals; `now` is the time
    /// since the host was started.
    #[must_use]
    pub fn are_fresh(&self, now: Duration) -> bool {
        self.age(now) <= Duration::from_millis(self.interval_ms.saturating_mul(3))
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Checked {
    /// The balancer and the backend.
    #[must_use]
    pub fn backend(&self) -> (Option<String>, Endpoint) {
        (self.balancer.clone(), self.endpoint())
    }

    /// Its address and port.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.address,
            port: self.port,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_fresh_for_three_intervals() {
        let verdicts = Verdicts {
            written_ms: 100_000,
            interval_ms: 500,
            backends: Vec::new(),
        };
        let is_fresh = |now| verdicts.are_fresh(Duration::from_millis(now));
        assert!(is_fresh(100_000) && is_fresh(101_500));
        assert!(!is_fresh(101_501));
        // Of an earlier start of the host.
        assert!(!is_fresh(99_000));
    }
}
