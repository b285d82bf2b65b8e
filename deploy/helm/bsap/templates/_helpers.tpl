{{- define "bsap.labels" -}}
app.kubernetes.io/name: bsap
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "bsap.selector" -}}
app.kubernetes.io/name: bsap
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "bsap.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The pod of every component; takes root, command and resources, and optionally env, ports, probes
     and preStop (seconds to wait before it ends). */}}
{{- define "bsap.pod" -}}
serviceAccountName: {{ .root.Release.Name }}-bsap
automountServiceAccountToken: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile: {type: RuntimeDefault}
containers:
  - name: bsap
    image: {{ include "bsap.image" .root }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    args: {{ toJson .command }}
    env:
      - {name: BSAP_CONFIG, value: /etc/bsap/bsap.toml}
      - {name: HF_HOME, value: /models/huggingface}
    {{- with .env }}
    {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .root.Values.secretName }}
    envFrom:
      - secretRef: {name: {{ . }}}
    {{- end }}
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities: {drop: [ALL]}
    resources: {{- toYaml .resources | nindent 6 }}
    {{- with .ports }}
    ports: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .preStop }}
    # Clients still send requests here for some seconds after the pod began to terminate.
    lifecycle: {preStop: {exec: {command: [sleep, {{ . | quote }}]}}}
    {{- end }}
    {{- with .probes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    volumeMounts:
      - {name: config, mountPath: /etc/bsap, readOnly: true}
      - {name: models, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
volumes:
  - name: config
    configMap: {name: {{ .root.Release.Name }}-bsap}
  - name: models
    {{- if .root.Values.modelClaim }}
    persistentVolumeClaim: {claimName: {{ .root.Values.modelClaim }}}
    {{- else }}
    emptyDir: {}
    {{- end }}
  - name: tmp
    emptyDir: {}
{{- end }}

{{/* A model may take minutes to load or to download: until then only the start-up probe runs. */}}
{{- define "bsap.probes" -}}
startupProbe:
  httpGet: {path: /livez, port: metrics}
  periodSeconds: 5
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /livez, port: metrics}
  periodSeconds: 15
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}
