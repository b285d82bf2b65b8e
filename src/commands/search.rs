//! `bsap search`: one query to a running server, or to the table itself.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::shared::configuration::{load_config, with_quiet_logging};
use super::shared::error::{CommandError, CommandResult};
use super::shared::models::load_configured_model;
use super::shared::printing::print_line;
use super::shared::query_worker::load_live_engine;
use super::shared::result_table::render_side_by_side;
use super::shared::runtime::{block_on, run_with_logging};
use crate::balance::normalise::Normaliser;
use crate::config::Config;
use crate::search::{Query, QueryError};
use crate::serve::http::{SearchRequest, SearchResponse};

/// Timeout of the request to a server.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);

/// `bsap search`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap search 'a red mug' --filter '{\"lte\": {\"price\": 20}}'
  bsap search --image photo.jpg                 images similar to a picture
  bsap search --similar-to shop/a.jpg -k 5      images similar to one of the catalogue")]
#[command(group(clap::ArgGroup::new("input").required(true).args(["text", "image", "similar_to"])))]
pub struct SearchArgs {
    /// Text to search for
    pub text: Option<String>,
    /// File of a picture: find similar images
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Id of an image of the catalogue: find similar ones
    #[arg(long, value_name = "ID")]
    pub similar_to: Option<String>,
    /// Filter that images must match: JSON as in docs/api.md
    #[arg(long, value_name = "JSON")]
    pub filter: Option<String>,
    /// Minimum balanced score of a hit: a number, or `calibrated`
    #[arg(long, value_name = "SCORE", allow_hyphen_values = true)]
    pub min_score: Option<String>,
    /// Address of a running server, for example http://127.0.0.1:8080 or https://shop.example/search;
    /// without it the table is read
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// Number of results
    #[arg(short, long, default_value_t = 10)]
    pub k: usize,
    /// Normaliser; by default the one that is served
    #[arg(long)]
    pub normaliser: Option<Normaliser>,
    /// Weight of the normalised score in the balanced score, 0 (plain CLIP) to 1; by default the
    /// one that is served
    #[arg(long)]
    pub weight: Option<f32>,
    /// Name of a prompt set; by default the one that is served
    #[arg(long, value_name = "NAME")]
    pub prompt_set: Option<String>,
    /// Print the answer as JSON, as the server returns it
    #[arg(long)]
    pub json: bool,
    /// API key for the server; safer in the variable, because lists of processes show arguments
    #[arg(long, env = "BSAP_KEY", hide_env_values = true, value_name = "KEY")]
    pub key: Option<String>,
}

/// Searches through a running server if `--server` is given, otherwise by reading the table.
pub fn run(args: &SearchArgs, config_file: Option<&Path>) -> CommandResult {
    if args.server.is_some() {
        return block_on(search_server(args));
    }
    let config = with_quiet_logging(load_config(config_file)?);
    run_with_logging(config, |config, token| search_table(args, config, token))
}

/// Sends the query to a running server, and prints the answer.
async fn search_server(args: &SearchArgs) -> CommandResult {
    let base = parse_server_address(args.server.as_deref().unwrap_or_default())
        .map_err(|reason| CommandError::usage(format!("--server: {reason}")))?;
    let answer = post_search(request_body(args)?, base, args.key.as_deref()).await?;
    print_answer(args, &answer)
}

/// Returns the address of a server, which ends with a slash, so that addresses of its interface can be
/// joined to it. Without a scheme it is one of HTTP. The parameters of a link to the page are dropped.
fn parse_server_address(server: &str) -> Result<url::Url, String> {
    let has_scheme = server.contains("://");
    let with_scheme = if has_scheme { server.to_owned() } else { format!("http://{server}") };
    // A single word is more likely a mistake than a host of the local network.
    let names_host = has_scheme || server.starts_with("localhost") || server.contains(['.', ':']);
    let is_server =
        |url: &url::Url| names_host && matches!(url.scheme(), "http" | "https") && url.has_host();
    let mut address = url::Url::parse(&with_scheme).ok().filter(is_server).ok_or(
        "the value is not an address such as http://127.0.0.1:8080, localhost:8080 or https://shop.example/search",
    )?;
    // The text may hold a password, so it is not repeated.
    if !address.username().is_empty() || address.password().is_some() {
        return Err(
            "the address has a user or a password; give the key in the variable BSAP_KEY".into()
        );
    }
    address.set_query(None);
    address.set_fragment(None);
    if !address.path().ends_with('/') {
        address.set_path(&format!("{}/", address.path()));
    }
    Ok(address)
}

/// Returns the arguments as the body of `POST /v1/search`.
fn request_body(args: &SearchArgs) -> Result<Value, CommandError> {
    let image = args.image.as_ref().map(|file| {
        let bytes = std::fs::read(file);
        let bytes =
            bytes.map_err(|e| CommandError::usage(format!("--image: {}: {e}", file.display())));
        bytes.map(|bytes| STANDARD.encode(bytes))
    });
    let filter = args.filter.as_ref().map(|text| {
        serde_json::from_str(text).map_err(|e| CommandError::usage(format!("--filter: {e}")))
    });
    let min_score = args.min_score.as_ref().map(|text| match text.parse::<f32>() {
        Ok(score) => json!(score),
        Err(_) => json!(text),
    });
    let mut body = json!({
        "text": args.text,
        "image": image.transpose()?,
        "image_id": args.similar_to,
        "k": args.k,
        "filter": filter.transpose()?.unwrap_or(Value::Null),
        "min_score": min_score,
        "normaliser": args.normaliser,
        "weight": args.weight,
        "prompt_set": args.prompt_set,
    });
    if let Some(fields) = body.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    Ok(body)
}

async fn post_search(
    body: Value,
    base: url::Url,
    key: Option<&str>,
) -> anyhow::Result<SearchResponse> {
    let client = reqwest::Client::builder().timeout(SERVER_TIMEOUT).build()?;
    let url = base.join("v1/search")?;
    let mut request =
        client.post(url).header(CONTENT_TYPE, "application/json").body(body.to_string());
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let response = request
        .send()
        .await
        .with_context(|| format!("{base}: no answer; is a server running (`bsap serve`)?"))?;
    let status = response.status();
    let bytes = response
        .bytes()
        .await
        .with_context(|| format!("{base}: the connection broke off during the answer"))?;
    if !status.is_success() {
        let problem: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        bail!("{base}: {status}: {}", problem["detail"].as_str().unwrap_or("no reason given"));
    }
    serde_json::from_slice(&bytes)
        .with_context(|| format!("{base}: the answer is not that of a bsap server"))
}

/// Loads the table into memory, searches it, and prints the answer.
async fn search_table(
    args: &SearchArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let request = serde_json::from_value::<SearchRequest>(request_body(args)?);
    let query =
        Query::try_from(request.map_err(CommandError::usage)?).map_err(CommandError::usage)?;
    let encoders = load_configured_model(&config)?;
    let Some(engine) = load_live_engine(&config, encoders, &token).await? else {
        return Ok(());
    };
    let results = tokio::task::spawn_blocking(move || engine.search(&query)).await?;
    match results {
        Ok(results) => print_answer(args, &SearchResponse::new(&results)),
        Err(error @ (QueryError::InvalidField { .. } | QueryError::ImageNotFound(_))) => {
            Err(CommandError::usage(error))
        }
        Err(error) => Err(error.into()),
    }
}

fn print_answer(args: &SearchArgs, answer: &SearchResponse) -> CommandResult {
    if args.json {
        print_line!("{}", serde_json::to_string_pretty(answer)?);
    } else {
        print_line!("{}", render_side_by_side(answer));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_addresses_keep_their_path_and_need_no_scheme() {
        for (server, url) in [
            ("localhost:8080", "http://localhost:8080/v1/search"),
            ("127.0.0.1:8080", "http://127.0.0.1:8080/v1/search"),
            ("[::1]:8080/", "http://[::1]:8080/v1/search"),
            ("shop.example/search", "http://shop.example/search/v1/search"),
            ("https://shop.example/search/", "https://shop.example/search/v1/search"),
            (
                "https://shop.example/search/?q=a+mug#picture=",
                "https://shop.example/search/v1/search",
            ),
        ] {
            let joined = parse_server_address(server).unwrap().join("v1/search").unwrap();
            assert_eq!(joined.as_str(), url, "{server}");
        }
        for wrong in
            ["", "nonsense", "ftp://shop.example", "http://", "http:///", "a b", "file:///v1"]
        {
            assert!(parse_server_address(wrong).is_err(), "{wrong}");
        }
        let error = parse_server_address("https://me:swordfish@shop.example").unwrap_err();
        assert!(error.contains("BSAP_KEY") && !error.contains("swordfish"), "{error}");
    }
}
