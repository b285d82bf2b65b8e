// Makes a container: node container.mjs NAME. Waits until the server answers.
import { BlobServiceClient, StorageSharedKeyCredential } from "@azure/storage-blob";

const { AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_ENDPOINT } = process.env;
const key = new StorageSharedKeyCredential(AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY);
const retryOptions = { maxTries: 40, retryDelayInMs: 250, maxRetryDelayInMs: 500 };
const service = new BlobServiceClient(AZURE_STORAGE_ENDPOINT, key, { retryOptions });
await service.getContainerClient(process.argv[2]).createIfNotExists();
