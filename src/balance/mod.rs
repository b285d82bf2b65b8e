//! BSAP: balancing the scores of images with auxiliary prompts (Balanced Score with Auxiliary
//! Prompts, arXiv 2402.18400). Pure computations, without I/O.
//!
//! Some images score high for almost any text, so that plain CLIP returns them for queries that they
//! do not match. BSAP corrects this with the scores that an image has for a fixed set of auxiliary
//! prompts: an embedding of d values times K prompt embeddings of d values gives K scores. They depend
//! on the image alone, so that their statistics (seven numbers per image and prompt set: count, mean,
//! standard deviation, minimum, maximum, log-sum-exp and mean of the k largest) are computed once,
//! when the image is ingested (`statistics`). A normaliser turns them and constants of the catalogue
//! into two numbers per image, α and β, which balance its raw score s for any query as α·s + β
//! (`normalise`). How well a prompt set fits the queries of a catalogue can be measured without judgements
//! (`fit`), and decides which settings are proposed (`proposal`, `bank`); `products` multiplies many embeddings with many
//! others. Thresholds on balanced scores, and how
//! strongly balancing changed answers when they were measured, are kept with a configuration
//! (`calibration`).

pub mod bank;
pub mod calibration;
pub mod evidence;
pub mod fit;
pub mod normalise;
pub(crate) mod products;
pub mod proposal;
mod real;
pub mod statistics;
