"use strict";

// The document may take an API key, which a browser does not send by itself. Then this one is shown first: nothing but
// the "Authorize" dialog. The key that is entered there fetches the real one, and is sent with what is tried out.
function locked(sentence) {
  return {
    openapi: "3.1.0",
    info: { title: "evalmode", version: "locked", description: sentence },
    paths: {},
    components: { securitySchemes: { key: { type: "http", scheme: "bearer" } } },
  };
}

async function fetched(key) {
  const headers = key === undefined ? {} : { Authorization: `Bearer ${key}` };
  const answer = await fetch("/openapi.json", { headers });
  if (answer.ok) {
    return answer.json();
  }
  const refusal = await answer.json();
  return locked(key === undefined ? "Authorize with an API key that may predict." : refusal.error);
}

const unlocking = () => ({
  statePlugins: {
    auth: {
      wrapActions: {
        authorize: (authorize, system) => (entered) => {
          const done = authorize(entered);
          const [{ value }] = Object.values(entered);
          fetched(value).then((document) => system.specActions.updateSpec(JSON.stringify(document)));
          return done;
        },
      },
    },
  },
});

fetched().then((document) => {
  SwaggerUIBundle({
    spec: document,
    dom_id: "#swagger-ui",
    plugins: [unlocking],
    deepLinking: true,
    tryItOutEnabled: true,
    defaultModelsExpandDepth: 0,
    validatorUrl: null,
  });
});
