//! The addresses of names, as this host finds them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::netfilter::Protocol;

/// All addresses of a host's name, by whatever the host resolves names with:
/// `/etc/hosts`, DNS and so on, as `/etc/nsswitch.conf` has it.
///
/// # Errors
/// Why there are none, in the resolver's words, or that it took too long.
pub fn lookup(name: &str) -> Result<Vec<IpAddr>, String> {
    const LIMIT: Duration = Duration::from_secs(20);
    let (answer, answered) = mpsc::channel();
    let question = (name.to_owned(), 0);
    // The resolver cannot be interrupted: its thread is left behind.
    thread::spawn(move || answer.send(question.to_socket_addrs()));
    match answered.recv_timeout(LIMIT) {
        Ok(Ok(found)) => Ok(found.map(|found| found.ip()).collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!(
            "the resolver did not answer within {} seconds",
            LIMIT.as_secs()
        )),
    }
}

/// Names and their addresses for a program that goes on for ever. An answer serves
/// until a later one, also when the resolver fails for a while.
#[derive(Default)]
pub struct Names {
    known: RefCell<BTreeMap<String, Vec<IpAddr>>>,
    pending: RefCell<Option<mpsc::Receiver<Answers>>>,
}

/// The addresses of each name that has some.
type Answers = BTreeMap<String, Vec<IpAddr>>;

impl Names {
    /// The addresses that are known of a name, else as [`lookup`].
    ///
    /// # Errors
    /// As [`lookup`], for a name of which nothing is known.
    pub fn lookup(&self, name: &str) -> Result<Vec<IpAddr>, String> {
        if let Some(known) = self.known.borrow().get(name) {
            return Ok(known.clone());
        }
        let found = lookup(name)?;
        let mut known = self.known.borrow_mut();
        known.insert(name.to_owned(), found.clone());
        Ok(found)
    }

    /// Looks all names up again, without waiting for the answers.
    pub fn refresh(&self) {
        let names: Vec<String> = self.known.borrow().keys().cloned().collect();
        let mut pending = self.pending.borrow_mut();
        if names.is_empty() || pending.is_some() {
            return;
        }
        let (answer, answered) = mpsc::channel();
        let ask = move || {
            let found = names.into_iter().filter_map(|name| {
                let found = lookup(&name).ok().filter(|found| !found.is_empty())?;
                Some((name, found))
            });
            answer.send(found.collect()).ok();
        };
        // Without a thread the known addresses serve on.
        if thread::Builder::new().spawn(ask).is_ok() {
            *pending = Some(answered);
        }
    }

    /// Takes the answers that have arrived; returns true if an address is another one.
    pub fn update(&self) -> bool {
        let mut pending = self.pending.borrow_mut();
        let answers = match pending.as_ref().map(mpsc::Receiver::try_recv) {
            None | Some(Err(mpsc::TryRecvError::Empty)) => return false,
            Some(answers) => answers.unwrap_or_default(),
        };
        *pending = None;
        let mut known = self.known.borrow_mut();
        let mut is_changed = false;
        for (name, mut found) in answers {
            found.sort_unstable();
            let before = known.insert(name, found.clone());
            is_changed |= before.is_none_or(|mut before| {
                before.sort_unstable();
                before != found
            });
        }
        is_changed
    }
}

/// The port of a service, as `/etc/services` has it for the protocol.
#[must_use]
pub fn service_port(name: &str, protocol: Protocol) -> Option<u16> {
    let text = fs::read_to_string("/etc/services").ok()?;
    port_in(&text, name, protocol)
}

/// Lines are `NAME PORT/PROTOCOL [ALIAS...] [# COMMENT]`, see `services(5)`.
fn port_in(services: &str, name: &str, protocol: Protocol) -> Option<u16> {
    services.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let first = words.next()?;
        let (port, of) = words.next()?.split_once('/')?;
        let is_named = first == name || words.any(|alias| alias == name);
        (is_named && of == protocol.as_str()).then(|| port.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_found_by_name_or_alias_for_its_protocol() {
        let text = "# services\nhttp\t\t80/tcp\twww\t# WorldWideWeb HTTP\nsyslog 514/udp\nodd\nbad x/tcp\n";
        let port = |name, protocol| port_in(text, name, protocol);
        assert_eq!(port("http", Protocol::Tcp), Some(80));
        assert_eq!(port("www", Protocol::Tcp), Some(80));
        assert_eq!(port("syslog", Protocol::Udp), Some(514));
        for (name, protocol) in [
            ("http", Protocol::Udp),
            ("WorldWideWeb", Protocol::Tcp),
            ("bad", Protocol::Tcp),
            ("", Protocol::Tcp),
        ] {
            assert_eq!(port(name, protocol), None, "{name}");
        }
    }
}
