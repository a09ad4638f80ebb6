//! Stub.
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::time::{Duration, Instant};
pub struct Probe {
    pub address: SocketAddr,
    pub method: ProbeMethod,
    pub timeout: Duration,
}
pub enum ProbeMethod {
    Tcp,
    Http(Rc<HttpProbe>),
}
pub struct HttpProbe {
    pub path: String,
    pub host: String,
    pub status: Vec<RangeInclusive<u16>>,
}
#[derive(Debug)]
pub enum ProbeFailure {
    Refused,
}
impl std::fmt::Display for ProbeFailure {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("connection refused")
    }
}
pub struct Prober;
impl Prober {
    pub fn new() -> io::Result<Self> {
        Ok(Self)
    }
    pub fn start(&mut self, _id: usize, _probe: &Probe) {}
    pub fn wait(
        &mut self,
        _deadline: Option<Instant>,
        _results: &mut Vec<(usize, Result<(), ProbeFailure>)>,
    ) -> io::Result<Vec<usize>> {
        Ok(vec![])
    }
}
