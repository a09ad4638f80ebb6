//! The program's own files: the request as it was last applied, the backends that
//! an operator holds, and the verdicts of a watcher.
//!
//! | file | directory | written by |
//! |---|---|---|
//! | `NAME.json` | `/var/lib/iptables_balance` | each run that applied a request |
//! | `NAME.holds.json` | `/var/lib/iptables_balance` | `hold` and `release` |
//! | `NAME.json` | `/run/iptables_balance` | `watch` |
//!
//! A broken file is never a reason not to run: it is ignored with a warning.

pub mod holds;
mod verdicts;

use anyhow::Result;

use crate::host::{Stamp, StateDirectory};
use crate::request::{Name, UncheckedRequest, json};
pub use holds::{Hold, Holds};
pub use verdicts::{Checked, Verdicts};

/// The files of one balancer or set.
#[derive(Clone, Debug)]
pub struct State {
    lasting: StateDirectory,
    volatile: StateDirectory,
    /// The name, as it stands in the names of files.
    name: String,
}

/// The text of a request as it is kept.
pub struct WordedRequest {
    text: Vec<u8>,
    /// The file that had the same text.
    kept_as: Option<Stamp>,
}

impl WordedRequest {
    /// Returns true if the request was applied already, and no other since.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.kept_as.is_some()
    }
}

/// A value from a file, and the warning if the file is broken.
pub struct Loaded<T> {
    /// The value; without the file, or with a broken one, the default.
    pub value: T,
    /// The file that is broken, and what follows from it.
    pub warning: Option<String>,
}

impl State {
    /// The files of a balancer.
    ///
    /// # Errors
    /// When others may write to one of the directories.
    pub fn of(name: &Name) -> Result<Self> {
        let state = Self {
            lasting: StateDirectory::lasting(),
            volatile: StateDirectory::volatile(),
            name: file_name(name),
        };
        state.lasting.check()?;
        state.volatile.check()?;
        Ok(state)
    }

    /// The text of the request as it was last applied.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn kept_request(&self) -> Result<Option<Vec<u8>>> {
        self.lasting.load(&self.request_file())
    }

    /// Words a request to be kept, and compares it with the one that is kept.
    #[must_use]
    pub fn compare(&self, request: &UncheckedRequest) -> WordedRequest {
        let text = request.to_json();
        let kept_as = self.lasting.stamp(&self.request_file());
        let kept = self.kept_request().ok().flatten();
        WordedRequest {
            kept_as: (kept.as_ref() == Some(&text)).then_some(kept_as),
            text,
        }
    }

    /// Keeps a request that was applied, if it is not the one that is kept.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep_request(&self, request: &WordedRequest) -> Result<()> {
        let file = self.request_file();
        match request.kept_as == Some(self.lasting.stamp(&file)) {
            true => Ok(()),
            false => self.lasting.store(&file, Some(&request.text)),
        }
    }

    /// Forgets the request and the holds of a balancer that was removed.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn forget(&self) -> Result<()> {
        for file in [self.request_file(), self.holds_file()] {
            if self.lasting.load(&file).is_ok_and(|text| text.is_some()) {
                self.lasting.store(&file, None)?;
            }
        }
        Ok(())
    }

    /// The backends that are held.
    #[must_use]
    pub fn holds(&self) -> Loaded<Holds> {
        let loaded = self.lasting.load(&self.holds_file());
        let path = self.lasting.path(&self.holds_file());
        read(loaded, Holds::parse).or_warn(|problem| {
            format!(
                "`{}` cannot be read, so no backend is held: {problem}; mend or remove it",
                path.display()
            )
        })
    }

    /// Replaces the list of holds.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store_holds(&self, holds: &Holds) -> Result<()> {
        let text = (!holds.is_empty()).then(|| holds.to_json());
        self.lasting.store(&self.holds_file(), text.as_deref())
    }

    /// The verdicts of a watcher.
    #[must_use]
    pub fn verdicts(&self) -> Loaded<Option<Verdicts>> {
        let file = self.verdicts_file();
        let path = self.volatile.path(&file);
        read(self.volatile.load(&file), |text| {
            Verdicts::parse(text).map(Some)
        })
        .or_warn(|problem| {
            format!(
                "`{}` cannot be read, so the backends are probed: {problem}",
                path.display()
            )
        })
    }

    /// Replaces the verdicts.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn store_verdicts(&self, verdicts: &Verdicts) -> Result<()> {
        self.volatile
            .store(&self.verdicts_file(), Some(&verdicts.to_json()))
    }

    /// A value that is another one after the request or the holds were replaced.
    #[must_use]
    pub fn stamps(&self) -> (Stamp, Stamp) {
        let stamp = |file: String| self.lasting.stamp(&file);
        (stamp(self.request_file()), stamp(self.holds_file()))
    }

    fn request_file(&self) -> String {
        format!("{}.json", self.name)
    }

    fn holds_file(&self) -> String {
        format!("{}.holds.json", self.name)
    }

    fn verdicts_file(&self) -> String {
        self.request_file()
    }
}

/// The names of all balancers of which a request is kept.
///
/// # Errors
/// When the directory cannot be listed, or others may write there.
pub fn kept_names() -> Result<Vec<Name>> {
    let lasting = StateDirectory::lasting();
    lasting.check()?;
    let files = lasting.files()?.into_iter();
    let name = |file: String| {
        let name = file.strip_suffix(".json")?;
        let name = name
            .strip_suffix(ESCAPED)
            .map_or_else(|| name.to_owned(), |rest| format!("{rest}{RESERVED}"));
        Name::new(&name)
            .ok()
            .filter(|parsed| format!("{}.json", file_name(parsed)) == file)
    };
    Ok(files.filter_map(name).collect())
}

/// The ending that the files of holds have. A balancer may have a name that ends so.
const RESERVED: &str = ".holds";
const ESCAPED: &str = "%2Eholds";

fn file_name(name: &Name) -> String {
    match name.as_str().strip_suffix(RESERVED) {
        None => name.as_str().to_owned(),
        Some(rest) => format!("{rest}{ESCAPED}"),
    }
}

/// The outcome of reading a file.
enum Read<T> {
    Value(T),
    Broken(String),
}

fn read<T: Default>(
    text: Result<Option<Vec<u8>>>,
    parse: impl FnOnce(&[u8]) -> Result<T, String>,
) -> Read<T> {
    match text {
        Ok(None) => Read::Value(T::default()),
        Ok(Some(text)) => parse(&text).map_or_else(Read::Broken, Read::Value),
        Err(error) => Read::Broken(format!("{error:#}")),
    }
}

impl<T: Default> Read<T> {
    fn or_warn(self, warning: impl FnOnce(&str) -> String) -> Loaded<T> {
        match self {
            Self::Value(value) => Loaded {
                value,
                warning: None,
            },
            Self::Broken(problem) => Loaded {
                value: T::default(),
                warning: Some(warning(&problem)),
            },
        }
    }
}

/// A file's JSON as a value of a type.
fn from_json<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    let value = json::parse(text).map_err(|error| error.to_string())?;
    serde_json::from_value(value).map_err(|error| error.to_string())
}

/// A value as the text of a file.
fn to_json<T: serde::Serialize>(value: &T) -> Vec<u8> {
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_balancer_has_the_file_of_another() {
        let file = |name| file_name(&Name::new(name).unwrap());
        assert_eq!(file("EDGE"), "EDGE");
        assert_eq!(file("EDGE.holds"), "EDGE%2Eholds");
        assert_eq!(file("a.holds.b"), "a.holds.b");
    }
}
