//! Backends that an operator took out of service for a while.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{from_json, to_json};
use crate::netfilter::Endpoint;

/// A backend that is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Its balancer, in a set.
    pub balancer: Option<String>,
    /// Its address.
    pub address: IpAddr,
    /// Its port, as the request has it.
    pub port: Option<u16>,
    /// The end, in seconds since 1970; without one it ends with `release`.
    pub until: Option<u64>,
    /// The operator's reason.
    pub reason: Option<String>,
}

/// The backends of a balancer or set that are held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    holds: Vec<Hold>,
}

impl Hold {
    /// The backend.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.address,
            port: self.port,
        }
    }

    /// The operator's reason, in brackets and on one line.
    #[must_use]
    pub fn shown_reason(&self) -> String {
        let reason = self.reason.as_ref().filter(|reason| !reason.is_empty());
        let printable = |letter: char| match letter.is_control() {
            true => ' ',
            false => letter,
        };
        reason.map_or_else(String::new, |reason| {
            format!(" ({})", reason.chars().map(printable).collect::<String>())
        })
    }

    /// The time that is left, in words.
    #[must_use]
    pub fn time_left(&self, now: u64) -> String {
        match self.until {
            None => "until it is released".to_owned(),
            Some(until) => format!("for another {}", duration(until.saturating_sub(now))),
        }
    }
}

/// The two largest units of a time in seconds: `1 h 59 min`.
#[must_use]
pub fn duration(seconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s")];
    let first = UNITS.iter().position(|(unit, _)| seconds >= *unit);
    let Some(first) = first else {
        return "0 s".to_owned();
    };
    let (unit, name) = UNITS[first];
    let shown = format!("{} {name}", seconds / unit);
    let rest = UNITS
        .get(first + 1)
        .map(|(next, name)| (seconds % unit / next, name));
    match rest {
        Some((count @ 1.., name)) => format!("{shown} {count} {name}"),
        _ => shown,
    }
}

impl Holds {
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

    /// Returns true if there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.holds.is_empty()
    }

    /// The holds that have not ended; `now` is in seconds since 1970.
    pub fn active(&self, now: u64) -> impl Iterator<Item = &Hold> {
        let holds = self.holds.iter();
        holds.filter(move |hold| hold.until.is_none_or(|until| until > now))
    }

    /// Adds a hold in the place of an earlier one of the same backend. Those that
    /// have ended are dropped.
    #[must_use]
    pub fn with(&self, hold: Hold, now: u64) -> Self {
        let mut holds = self.without(hold.balancer.as_deref(), hold.endpoint(), now);
        holds.holds.push(hold);
        holds
    }

    /// The holds without those of a backend, and without those that have ended.
    #[must_use]
    pub fn without(&self, balancer: Option<&str>, endpoint: Endpoint, now: u64) -> Self {
        let is_meant =
            |hold: &Hold| hold.balancer.as_deref() == balancer && hold.endpoint() == endpoint;
        let kept = self.active(now).filter(|hold| !is_meant(hold));
        Self {
            holds: kept.cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(address: &str, until: Option<u64>) -> Hold {
        Hold {
            balancer: None,
            address: address.parse().unwrap(),
            port: Some(80),
            until,
            reason: None,
        }
    }

    #[test]
    fn a_hold_ends_at_its_time() {
        let holds = Holds::default()
            .with(hold("192.0.2.1", Some(100)), 0)
            .with(hold("192.0.2.2", None), 0);
        assert_eq!(holds.active(99).count(), 2);
        assert_eq!(holds.active(100).count(), 1);
        assert_eq!(holds.with(hold("192.0.2.3", None), 100).holds.len(), 2);
    }

    #[test]
    fn a_later_hold_of_a_backend_replaces_the_earlier_one() {
        let holds = Holds::default().with(hold("192.0.2.1", Some(100)), 0);
        let holds = holds.with(hold("192.0.2.1", Some(200)), 0);
        assert_eq!(holds.holds, [hold("192.0.2.1", Some(200))]);
        let endpoint = hold("192.0.2.1", None).endpoint();
        assert!(!holds.without(Some("web"), endpoint, 0).is_empty());
        assert!(holds.without(None, endpoint, 0).is_empty());
    }

    #[test]
    fn a_file_reads_as_it_was_written() {
        let holds = Holds::default().with(hold("fd00::1", Some(100)), 0);
        assert_eq!(Holds::parse(&holds.to_json()), Ok(holds));
        for broken in ["", "{}", "[]", "{\"holds\": [{}]}", "{\"holds\": []} x"] {
            assert!(Holds::parse(broken.as_bytes()).is_err(), "{broken}");
        }
    }

    #[test]
    fn times_have_their_two_largest_units() {
        let shown = [0, 59, 60, 61, 3600, 7199, 90_000, 86_400].map(duration);
        assert_eq!(
            shown,
            [
                "0 s",
                "59 s",
                "1 min",
                "1 min 1 s",
                "1 h",
                "1 h 59 min",
                "1 d 1 h",
                "1 d"
            ]
        );
    }
}
