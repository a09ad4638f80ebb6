//! The addresses of names, as this host finds them.

use std::net::{IpAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// All addresses of a host's name, by whatever the host resolves names with:
/// `/etc/hosts`, DNS and so on, as `/etc/nsswitch.conf` has it.
///
/// # Errors
/// Why there are none, in the resolver's words, or that it took too long.
pub fn lookup(name: &str) -> Result<Vec<IpAddr>, String> {
    const LIMIT: Duration = Duration::from_secs(20);
    let (answer, answered) = mpsc::channel();
    let question = (name.to_owned(), 0);
    // The resolver cannot be told to stop, so its thread is left behind.
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
