//! The lines that a watcher tells. Nothing is told twice in a row.

use std::collections::BTreeSet;

use crate::netfilter::Name;

/// The lines of one watcher.
pub(super) struct Log<'a> {
    name: String,
    tell: &'a mut dyn FnMut(&str),
    problem: Option<String>,
    warnings: BTreeSet<String>,
}

impl<'a> Log<'a> {
    pub fn new(name: &Name, tell: &'a mut dyn FnMut(&str)) -> Self {
        Self {
            name: name.as_str().to_owned(),
            tell,
            problem: None,
            warnings: BTreeSet::new(),
        }
    }

    pub fn say(&mut self, line: &str) {
        (self.tell)(&format!("{}: {line}", self.name));
    }

    /// Tells of a problem, unless it is the one that was told last.
    pub fn problem(&mut self, problem: &str) {
        if self.problem.as_deref() != Some(problem) {
            self.say(problem);
            self.problem = Some(problem.to_owned());
        }
    }

    /// Tells that the last problem is over, if there was one.
    pub fn no_problem(&mut self) {
        if self.problem.take().is_some() {
            self.say("recovered");
        }
    }

    /// Tells of warnings that the last run did not have. The number in a warning about
    /// the time that is left does not make it a new one.
    pub fn warnings(&mut self, warnings: &[String]) {
        let told: BTreeSet<String> = warnings
            .iter()
            .map(|warning| without_times(warning))
            .collect();
        for warning in warnings {
            if !self.warnings.contains(&without_times(warning)) {
                self.say(&format!("warning: {warning}"));
            }
        }
        self.warnings = told;
    }
}

fn without_times(warning: &str) -> String {
    match warning.split_once(" is held for another ") {
        None => warning.to_owned(),
        Some((backend, rest)) => {
            let rest = rest.split_once([';', '(']).map_or(rest, |(_, rest)| rest);
            format!("{backend} is held {rest}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_told_twice_in_a_row() {
        let mut lines = Vec::new();
        let mut tell = |line: &str| lines.push(line.to_owned());
        let mut log = Log::new(&Name::new("W").unwrap(), &mut tell);
        log.problem("no iptables");
        log.problem("no iptables");
        log.no_problem();
        log.no_problem();
        log.warnings(&[
            "a is held for another 2 h (disk); release".to_owned(),
            "b".to_owned(),
        ]);
        log.warnings(&["a is held for another 1 h (disk); release".to_owned()]);
        log.warnings(&["b".to_owned()]);
        let told = [
            "W: no iptables",
            "W: recovered",
            "W: warning: a is held for another 2 h (disk); release",
            "W: warning: b",
            "W: warning: b",
        ];
        assert_eq!(lines, told);
    }
}
