//! The variables that the tools of Hugging Face share: where the hub and its cache are, and the token.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::HeaderValue;
use url::Url;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Longest silence of the hub before an attempt is given up, unless `HF_HUB_DOWNLOAD_TIMEOUT` says
/// otherwise. Python's client waits 10 s, which a slow proxy exceeds.
const DEFAULT_STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Upper bound of `HF_HUB_DOWNLOAD_TIMEOUT`, in seconds.
const MAX_STALL_SECONDS: u64 = 3600;

/// How the hub is reached, and where its files are kept.
pub struct HubEnvironment {
    /// `HF_ENDPOINT`, without a slash at its end.
    pub endpoint: Url,
    /// `HF_HUB_CACHE`: the folder of all repositories.
    pub cache: PathBuf,
    /// Sent to the endpoint only.
    pub token: Option<Token>,
    /// The variable that forbids requests; `None` if none does.
    pub offline_variable: Option<&'static str>,
    /// Longest silence before an attempt is given up.
    pub stall_timeout: Duration,
    /// Whether a progress bar is shown if standard error is a terminal.
    pub shows_progress: bool,
}

/// A token of the hub. It has no `Debug` and is never part of a message.
pub struct Token {
    /// `Bearer …`, marked as sensitive.
    pub header: HeaderValue,
    /// The variable or file that has the token.
    pub source: String,
}

impl HubEnvironment {
    /// Reads the variables of this process.
    pub fn from_process() -> Result<Self, String> {
        Self::read(|name| std::env::var_os(name), std::env::home_dir())
    }

    /// Reads the variables that `variable` returns. An empty variable counts as unset.
    pub fn read(
        variable: impl Fn(&str) -> Option<OsString>,
        home: Option<PathBuf>,
    ) -> Result<Self, String> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let home = home.filter(|home| home.is_absolute());
        let path = |name: &str| variable(name).map(|value| expand_home(value, home.as_deref()));
        let flag = |name: &str| {
            variable(name).is_some_and(|value| {
                let value = value.to_string_lossy().to_uppercase();
                ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
            })
        };
        let hub_home = path("HF_HOME").or_else(|| {
            let caches = path("XDG_CACHE_HOME").or_else(|| Some(home.as_ref()?.join(".cache")));
            Some(caches?.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(hub_home.as_ref()?.join("hub")))
            .ok_or("the cache of the hub has no folder, because HOME names none; set HF_HOME or HF_HUB_CACHE to a folder")?;
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(hub_home.as_ref()?.join("token")));
        let token = if flag("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            None
        } else {
            read_token(&variable, token_file.as_deref())?
        };
        let offline_variable =
            ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(|name| flag(name));
        Ok(Self {
            endpoint: parse_endpoint(variable("HF_ENDPOINT"))?,
            cache,
            token,
            offline_variable,
            stall_timeout: parse_stall_timeout(variable("HF_HUB_DOWNLOAD_TIMEOUT"))?,
            shows_progress: !flag("HF_HUB_DISABLE_PROGRESS_BARS"),
        })
    }
}

fn expand_home(path: OsString, home: Option<&Path>) -> PathBuf {
    let path = PathBuf::from(path);
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

fn parse_endpoint(value: Option<OsString>) -> Result<Url, String> {
    let written =
        value.map_or_else(|| DEFAULT_ENDPOINT.into(), |v| v.to_string_lossy().into_owned());
    // The address may have a password in it, so the message does not repeat it.
    let invalid = "HF_ENDPOINT is not an address such as https://huggingface.co";
    let endpoint = Url::parse(written.trim_end_matches('/')).map_err(|_| invalid)?;
    if !matches!(endpoint.scheme(), "http" | "https") || endpoint.host_str().is_none() {
        return Err(invalid.into());
    }
    Ok(endpoint)
}

fn parse_stall_timeout(value: Option<OsString>) -> Result<Duration, String> {
    let Some(value) = value else { return Ok(DEFAULT_STALL_TIMEOUT) };
    let value = value.to_string_lossy();
    match value.trim().parse() {
        Ok(seconds @ 1..=MAX_STALL_SECONDS) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!(
            "HF_HUB_DOWNLOAD_TIMEOUT={value} is not a number of seconds from 1 to {MAX_STALL_SECONDS}"
        )),
    }
}

/// Reads the token from the variables or from the file that the login of Hugging Face writes.
fn read_token(
    variable: &impl Fn(&str) -> Option<OsString>,
    file: Option<&Path>,
) -> Result<Option<Token>, String> {
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(value) = variable(name) {
            let token = parse_token(&value.to_string_lossy(), name.to_owned())?;
            if token.is_some() {
                return Ok(token);
            }
        }
    }
    // Without a login there is no file.
    match file.and_then(|file| Some((file, std::fs::read_to_string(file).ok()?))) {
        Some((file, written)) => parse_token(&written, file.display().to_string()),
        None => Ok(None),
    }
}

fn parse_token(written: &str, source: String) -> Result<Option<Token>, String> {
    let token = written.trim();
    if token.is_empty() {
        return Ok(None);
    }
    let unusable = || format!("the token of {source} has characters that no token of the hub has");
    if !token.chars().all(|c| c.is_ascii_graphic()) {
        return Err(unusable());
    }
    let mut header = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| unusable())?;
    header.set_sensitive(true);
    Ok(Some(Token { header, source }))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn read(variables: &[(&str, &str)], home: Option<&str>) -> Result<HubEnvironment, String> {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        HubEnvironment::read(|name| Some((*variables.get(name)?).into()), home.map(Into::into))
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        for (variables, expected) in [
            (&[][..], "/home/u/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/h/hub"),
            (&[("HF_HOME", "~/h")], "/home/u/h/hub"),
            (&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
            (&[("HF_HOME", ""), ("HF_HUB_CACHE", "")], "/home/u/.cache/huggingface/hub"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/c")], "/c"),
        ] {
            let environment = read(variables, Some("/home/u")).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(environment.cache, Path::new(expected), "{variables:?}");
        }
    }

    #[test]
    fn without_a_home_the_message_names_the_variables() {
        for home in [None, Some("")] {
            let error = read(&[], home).err().unwrap();
            assert!(error.contains("HOME") && error.contains("HF_HUB_CACHE"), "{error}");
            assert!(read(&[("HF_HUB_CACHE", "/c")], home).is_ok());
        }
    }

    #[test]
    fn a_token_comes_from_a_variable_or_a_file_and_is_never_in_a_message() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let token = |variables: &[(&str, &str)]| {
            let variables = [variables, &[("HF_HOME", home)]].concat();
            let token = read(&variables, None).unwrap_or_else(|e| panic!("{e}")).token;
            token.map(|t| (t.header.to_str().unwrap().to_owned(), t.header.is_sensitive()))
        };
        assert_eq!(token(&[]), None);
        assert_eq!(token(&[("HF_TOKEN", " \n")]), None);
        assert_eq!(token(&[("HF_TOKEN", "hf_a\n")]), Some(("Bearer hf_a".into(), true)));
        std::fs::write(folder.path().join("token"), "hf_b\n").unwrap();
        assert_eq!(token(&[]), Some(("Bearer hf_b".into(), true)));
        assert_eq!(token(&[("HF_TOKEN", "hf_a")]), Some(("Bearer hf_a".into(), true)));
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        let error = read(&[("HF_TOKEN", "hf_a\u{7}secret")], Some(home)).err().unwrap();
        assert!(error.contains("HF_TOKEN") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn invalid_variables_are_refused_by_name() {
        for (name, value) in [
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_ENDPOINT", "ftp://u:secret@x"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "ten"),
        ] {
            let error = read(&[(name, value)], Some("/home/u")).err().unwrap();
            assert!(error.contains(name) && !error.contains("secret"), "{error}");
        }
        let endpoint = read(&[("HF_ENDPOINT", "http://h:1/hub/")], Some("/h")).ok().unwrap();
        assert_eq!(endpoint.endpoint.as_str(), "http://h:1/hub");
    }

    #[test]
    fn requests_are_forbidden_as_in_python() {
        for (value, offline) in [("1", true), ("yes", true), ("True", true), ("0", false)] {
            for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
                let read = read(&[(name, value)], Some("/h")).ok().unwrap();
                assert_eq!(read.offline_variable, offline.then_some(name), "{name}={value}");
            }
        }
    }
}
