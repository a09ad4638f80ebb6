//! Probes of backends: connections that only find out if somebody answers.
//!
//! One loop waits for all of them ([`Prober`]); a thread for each would cost a
//! thousand stacks. `rustix`, which is here anyway, has the kernel's `epoll`
//! without unsafe code.

mod bypass;
mod connection;
mod failure;
mod prober;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::time::Duration;

pub use failure::ProbeFailure;
pub use prober::{ProbeResult, Prober, SourceKey};

/// The way to probe one endpoint.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The endpoint to connect to.
    pub address: SocketAddr,
    /// The way to ask.
    pub method: ProbeMethod,
    /// The time that the connection and the answer may take together.
    pub timeout: Duration,
}

/// The way to ask an endpoint.
#[derive(Clone, Debug)]
pub enum ProbeMethod {
    /// The connection is accepted.
    Tcp,
    /// A request is answered with an expected status.
    Http(Rc<HttpProbe>),
}

/// A request, and the answers that are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpProbe {
    /// The path with its query, as it stands in the request line.
    pub path: String,
    /// The value of the header `Host`.
    pub host: String,
    /// The expected status codes.
    pub status: Vec<RangeInclusive<u16>>,
}
